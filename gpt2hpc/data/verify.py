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


class Checker:
    """Hashes those shards of a directory whose size or time of change is not in the file `memo`, and notes them there.

    Attributes:
        left: Shards that are to be hashed still.
        hashed: Bytes hashed so far.
    """

    def __init__(self, manifest: Manifest, memo: Path) -> None:
        known: Any = durable.read_json(memo)
        self._memo, self._known = memo, known if isinstance(known, dict) else {}
        self._directory, self.hashed = Path(manifest.where), 0
        self.left = [
            shard for shard in manifest.shards if shard.sha256 and self._known.get(shard.file) != self._mark(shard)
        ]

    def advance(self, seconds: float) -> None:
        """Hash for about so long, a shard a core at a time. Raises DataError, naming it, for one that is damaged."""
        deadline, at_once = time.monotonic() + seconds, len(os.sched_getaffinity(0))
        before = self.hashed
        with ThreadPoolExecutor(at_once) as threads:
            while self.left and (time.monotonic() < deadline or self.hashed == before):
                now, self.left = self.left[:at_once], self.left[at_once:]
                marks = [self._mark(shard) for shard in now]  # of before: what is written meanwhile is hashed again
                found = list(threads.map(lambda shard: _problem(self._directory / shard.file, shard), now))
                for shard, mark, problem in zip(now, marks, found, strict=True):
                    if problem:
                        raise DataError(
                            f"{self._directory / shard.file} {problem}: damaged since it was made; restore it, or delete it "
                            "and run `gpt2hpc prepare` again: it does that unit alone"
                        )
                    self._known[shard.file] = mark
                    self.hashed += shard.bytes
        if self.hashed > before:
            durable.publish_json(self._memo, self._known)

    def _mark(self, shard: Shard) -> list[Any]:
        """What an ordinary write to the file changes."""
        with contextlib.suppress(OSError):
            status = (self._directory / shard.file).stat()
            return [shard.sha256, status.st_size, status.st_mtime_ns, status.st_ino]
        return []
