"""Shards: uint16 `.npy` files of one unit's tokens, each with a JSON sidecar that is written last.

A shard is done when its sidecar is there, belongs to the plan at hand, and names the size that the file has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
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


@dataclass(frozen=True)
class Shard:
    """What a sidecar says: `tokens` and `documents` are counts, `bytes` and `sha256` are the file's."""

    file: str
    split: Split
    tokens: int
    documents: int
    bytes: int
    sha256: str
    plan_sha256: str


def shard_name(split: Split, unit: int) -> str:
    return f"{split}_{unit:06d}.npy"


def sidecar_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def write_shard(directory: Path, *, split: Split, unit: int, tokens: Tokens, documents: int, plan_sha256: str) -> Shard:
    """Publish the tokens, then the sidecar; `tokens` is 1-D uint16."""
    path = directory / shard_name(split, unit)
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    contents = buffer.getbuffer()
    durable.publish_bytes(path, contents)
    shard = Shard(
        file=path.name,
        split=split,
        tokens=len(tokens),
        documents=documents,
        bytes=len(contents),
        sha256=hashlib.sha256(contents).hexdigest(),
        plan_sha256=plan_sha256,
    )
    durable.publish_json(sidecar_path(path), dataclasses.asdict(shard))
    return shard


def done_shard(path: Path, plan_sha256: str) -> Shard | None:
    """The shard at `path` if it is complete and of this plan."""
    facts = durable.read_json(sidecar_path(path))
    if not facts or facts.get("plan_sha256") != plan_sha256:
        return None
    shard = Shard(**facts)
    return shard if path.is_file() and path.stat().st_size == shard.bytes else None


def check_size(path: Path, shard: Shard) -> None:
    """Raise DataError where the file is missing or not of the size that the manifest says."""
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path} is missing; run `gpt2hpc prepare` again") from None
    if size != shard.bytes:
        raise DataError(f"{path} has {size} bytes, its manifest says {shard.bytes}; run `gpt2hpc prepare` again")


def open_shard(path: Path, shard: Shard) -> Tokens:
    """The tokens, memory-mapped; DataError where the file is not what the manifest says."""
    check_size(path, shard)
    tokens: Tokens = np.load(path, mmap_mode="r")
    if tokens.dtype != np.uint16 or tokens.shape != (shard.tokens,):
        raise DataError(f"{path} holds {tokens.dtype} {tokens.shape}, its manifest says uint16 ({shard.tokens},)")
    return tokens
