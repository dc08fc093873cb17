"""Whether shards hold the bytes that their manifest says, by sha256: all of them, or those that changed since the last look."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.shards import Shard, sha256_of
from gpt2hpc.errors import DataError

NOTE_EVERY_S = 30.0


def problems(manifest: Manifest) -> Iterator[tuple[Shard, str | None]]:
    """Each shard of a directory with what is wrong with it, or None; hashed by a thread a core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        yield from zip(
            manifest.shards,
            threads.map(lambda shard: _problem(Path(manifest.where) / shard.file, shard), manifest.shards),
            strict=True,
        )


def _problem(path: Path, shard: Shard) -> str | None:
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"has {size} bytes instead of {shard.bytes}"
        if shard.sha256 is not None and (found := sha256_of(path)) != shard.sha256:
            return f"has sha256 {found[:12]}… instead of {shard.sha256[:12]}…"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def check(manifest: Manifest, memo: Path) -> int:
    """Hash those shards of a directory whose size or time of change is not in the file `memo`, and note them there.

    Returns the bytes hashed. Raises DataError, naming it, for a shard that is damaged.
    """
    noted: Any = durable.read_json(memo)
    known: dict[str, Any] = noted if isinstance(noted, dict) else {}
    directory, at_once, hashed = Path(manifest.where), len(os.sched_getaffinity(0)), 0
    left = [shard for shard in manifest.shards if shard.sha256 and known.get(shard.file) != _mark(directory, shard)]
    noted_at = time.monotonic()
    with ThreadPoolExecutor(at_once) as threads:
        while left:
            now, left = left[:at_once], left[at_once:]
            marks = [_mark(directory, shard) for shard in now]  # of before: what is written meanwhile is hashed again
            found = list(threads.map(lambda shard: _problem(directory / shard.file, shard), now))
            for shard, mark, problem in zip(now, marks, found, strict=True):
                if problem:
                    raise DataError(
                        f"{directory / shard.file} {problem}: damaged since it was made; restore it, or delete it "
                        "and run `gpt2hpc prepare` again: it does that unit alone"
                    )
                known[shard.file] = mark
                hashed += shard.bytes
            # Now and then, so that a start that is cut short has not hashed for nothing.
            if not left or time.monotonic() - noted_at > NOTE_EVERY_S:
                durable.publish_json(memo, known)
                noted_at = time.monotonic()
    return hashed


def _mark(directory: Path, shard: Shard) -> list[Any]:
    """What an ordinary write to the file changes."""
    with contextlib.suppress(OSError):
        status = (directory / shard.file).stat()
        return [shard.sha256, status.st_size, status.st_mtime_ns, status.st_ino]
    return []
