"""Shards: uint16 `.npy` files of one unit's tokens, memory-mapped when read; llm.c's `.bin` files are read too."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from gpt2hpc import durable
from gpt2hpc.errors import DataError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
Tokens = npt.NDArray[np.uint16]

HEADER_BYTES = 128
"""Of the .npy files that are written here."""
BIN_MAGIC, BIN_VERSION = 20240520, 1
BIN_HEADER_BYTES = 256 * 4
"""llm.c's `.bin`: 256 int32, of which the first three are magic, version and the number of uint16 tokens that follow."""


class AbsentError(DataError):
    """Data that is not where it should be on a disk. `what` is that alone, without a mend."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(f"{what}{mend}")
        self.what = what


@dataclass(frozen=True)
class Shard:
    """What is known of a shard: `tokens` and `documents` are counts, `bytes` and `sha256` are the file's; None if nobody knows."""

    file: str
    split: Split
    tokens: int
    documents: int | None
    bytes: int
    sha256: str | None


def shard_name(split: Split, unit: int) -> str:
    return f"{split}_{unit:06d}.npy"


class ShardWriter:
    """Documents as they come, into one 1-D array on disk: memory does not grow with the unit.

    Within its block; at the end `publish`, or nothing is left of it.
    """

    def __init__(self, directory: Path, *, split: Split, unit: int) -> None:
        self._path, self._split = directory / shard_name(split, unit), split
        self._temporary = durable.temporary_name(self._path)
        self._tokens = self._documents = 0

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("w+b")
        self._file.write(_header(0))
        return self

    def append(self, documents: Sequence[Tokens]) -> None:
        """Each 1-D uint16."""
        if documents:
            self._file.write(np.concatenate(documents).astype("<u2", copy=False).data.cast("B"))
            self._tokens += sum(map(len, documents))
            self._documents += len(documents)

    def publish(self) -> Shard:
        self._file.seek(0)
        self._file.write(_header(self._tokens))
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        os.fsync(self._file.fileno())
        self._temporary.replace(self._path)
        durable.fsync_dir(self._path.parent)
        size = HEADER_BYTES + 2 * self._tokens
        return Shard(self._path.name, self._split, self._tokens, self._documents, size, digest)

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _header(tokens: int) -> bytes:
    """Of a .npy file, format 1.0; numpy pads it so that any count fits the same bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    assert len(header.getvalue()) == HEADER_BYTES
    return header.getvalue()


def write_shard(directory: Path, *, split: Split, unit: int, documents: Sequence[Tokens]) -> Shard:
    """All at once."""
    with ShardWriter(directory, split=split, unit=unit) as writer:
        writer.append(documents)
        return writer.publish()


def has_size(path: Path, shard: Shard) -> bool:
    try:
        return path.stat().st_size == shard.bytes
    except OSError:
        return False


def check_size(path: Path, shard: Shard) -> None:
    """Raise AbsentError where the file is missing, DataError where it is not of the size that the manifest says."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise AbsentError(f"{path} is missing", "; run `gpt2hpc prepare` again") from None
    if size != shard.bytes:
        raise DataError(f"{path} has {size} bytes, its manifest says {shard.bytes}; run `gpt2hpc prepare` again")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(path: Path, shard: Shard) -> Tokens:
    """The tokens, memory-mapped; DataError where the file is not what the manifest says."""
    check_size(path, shard)
    if path.suffix == ".bin":
        found: Tokens = np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER_BYTES)
    else:
        found = np.load(path, mmap_mode="r")
    if found.dtype != np.uint16 or found.shape != (shard.tokens,):
        raise DataError(f"{path} holds {found.dtype} {found.shape}, its manifest says uint16 ({shard.tokens},)")
    return found
