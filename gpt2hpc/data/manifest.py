"""`manifest.json`: the shards of a prepared directory in their order, and what they were made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.data.shards import Shard, Split
from gpt2hpc.errors import DataError

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Prepared data: `vocab_size` tokens exist, `plan` tells the sources and rules."""

    directory: Path
    shards: tuple[Shard, ...]
    vocab_size: int
    plan: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Identity of the token stream: the vocabulary and the shards' names, splits and hashes in their order."""
        identity = [self.vocab_size, *((shard.file, shard.split, shard.tokens, shard.sha256) for shard in self.shards)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def split(self, split: Split) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.split(split))


def publish(directory: Path, shards: Sequence[Shard], *, vocab_size: int, plan: dict[str, Any]) -> Manifest:
    """Write the manifest: from then on the directory can be trained on."""
    manifest = Manifest(directory, tuple(shards), vocab_size, plan)
    facts = {
        "format": FORMAT,
        "sha256": manifest.sha256,
        "vocab_size": vocab_size,
        "tokens": {"train": manifest.tokens("train"), "val": manifest.tokens("val")},
        "plan": plan,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    durable.publish_json(directory / NAME, facts)
    return manifest


def load(directory: Path) -> Manifest:
    """Raises DataError where there is no manifest, or one that contradicts itself."""
    path = directory / NAME
    if not path.is_file():
        where = "" if directory.is_absolute() else f" ({directory.absolute()})"
        raise DataError(
            f"data.dir={directory} holds no {NAME}{where}; make it with `gpt2hpc prepare --source … --out {directory}`"
        )
    facts: Any = durable.read_json(path)
    if not isinstance(facts, dict):
        raise DataError(f"{path} is not JSON; run `gpt2hpc prepare` again")
    try:
        if facts["format"] != FORMAT:
            raise DataError(
                f"{path} is of format {facts['format']}, this version reads {FORMAT}; prepare the data again"
            )
        shards = tuple(Shard(**shard) for shard in facts["shards"])
        manifest = Manifest(directory, shards, facts["vocab_size"], facts["plan"])
        if manifest.sha256 != facts["sha256"]:
            raise DataError(f"{path} was edited: its sha256 does not fit its shards; run `gpt2hpc prepare` again")
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged (it lacks {error}); run `gpt2hpc prepare` again") from None
    return manifest
