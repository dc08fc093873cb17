"""Shards: uint16 `.npy` files of one unit's tokens, memory-mapped when read; llm.c's `.bin` files are read too."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
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

BIN_MAGIC, BIN_VERSION = 20240520, 1
BIN_HEADER_BYTES = 256 * 4
"""llm.c's `.bin`: 256 int32, of which the first three are magic, version and the number of uint16 tokens that follow."""


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


def write_shard(directory: Path, *, split: Split, unit: int, documents: Sequence[Tokens]) -> Shard:
    """Publish the tokens of documents, each 1-D uint16, as one 1-D array."""
    path = directory / shard_name(split, unit)
    tokens = sum(map(len, documents))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    digest = hashlib.sha256(header.getvalue())
    with durable.publishing(path) as file:
        file.write(header.getvalue())
        for chunk in _chunks(documents):
            digest.update(chunk)
            file.write(chunk)
    return Shard(path.name, split, tokens, len(documents), len(header.getvalue()) + 2 * tokens, digest.hexdigest())


def _chunks(documents: Sequence[Tokens], at_once: int = 4096) -> Iterator[memoryview]:
    """The bytes of the documents in large pieces, without a second copy of them all."""
    for start in range(0, len(documents), at_once):
        yield np.concatenate(documents[start : start + at_once]).astype("<u2", copy=False).data.cast("B")


def has_size(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes


def check_size(path: Path, shard: Shard) -> None:
    """Raise DataError where the file is missing or not of the size that the manifest says."""
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path} is missing; run `gpt2hpc prepare` again") from None
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
