"""Whether shards hold the bytes that their manifest says, by sha256: all of them, or those that changed since the last look."""

from __future__ import annotations

import os
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


def check_once(manifest: Manifest, memo: Path) -> int:
    """Hash those shards of a directory whose size or time of change is not in `memo`, then note them there.

    Returns the bytes hashed. Raises DataError, naming it, for a shard that is damaged.
    """
    known: Any = durable.read_json(memo)
    known = known if isinstance(known, dict) else {}
    marks = {shard.file: _mark(Path(manifest.where) / shard.file, shard) for shard in manifest.shards if shard.sha256}
    new = tuple(shard for shard in manifest.shards if shard.sha256 and known.get(shard.file) != marks[shard.file])
    for shard, problem in problems(Manifest(manifest.where, new, manifest.vocab_size)):
        if problem:
            raise DataError(
                f"{Path(manifest.where) / shard.file} {problem}: damaged since it was made; restore it, or delete it with its "
                "unit_*.json and run `gpt2hpc prepare` again"
            )
    if new:
        durable.publish_json(memo, marks)
    return sum(shard.bytes for shard in new)


def _mark(path: Path, shard: Shard) -> list[Any]:
    """What an ordinary write to the file changes."""
    try:
        status = path.stat()
        return [shard.sha256, status.st_size, status.st_mtime_ns, status.st_ino]
    except OSError:
        return []
