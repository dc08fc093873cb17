"""`manifest.json`: the shards of a prepared directory in their order, and what they were made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.data.shards import Shard, Split
from gpt2hpc.errors import DataError

FORMAT = 2
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Prepared data.

    Args:
        where: Its directory, or `hf://datasets/USER/NAME@COMMIT`.
        shards: In their order.
        vocab_size: Tokens that exist.
        plan: What it was made from: the plan's hash, the sources and the rules.
    """

    where: str
    shards: tuple[Shard, ...]
    vocab_size: int
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Identity of the token stream: the vocabulary and the shards' names, splits and hashes in their order.

        Where nobody has hashed them, by the hashes of their edges.
        """
        edges = self.plan.get("edges", {})
        identity = [
            self.vocab_size,
            *(
                (shard.file, shard.split, shard.tokens, shard.sha256 or edges.get(shard.file, shard.bytes))
                for shard in self.shards
            ),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def split(self, split: Split) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.split(split))

    def documents(self, split: Split) -> int | None:
        """None where the shards' maker did not count them."""
        counts = [shard.documents for shard in self.split(split)]
        return None if None in counts else sum(count for count in counts if count is not None)


def publish(
    directory: Path,
    shards: Sequence[Shard],
    *,
    vocab_size: int,
    plan: dict[str, Any],
    bad_documents: Sequence[dict[str, str]] = (),
) -> Manifest:
    """Write the manifest: from then on the directory can be trained on."""
    manifest = Manifest(str(directory), tuple(shards), vocab_size, plan)
    facts = {
        "format": FORMAT,
        "sha256": manifest.sha256,
        "vocab_size": vocab_size,
        "tokens": {"train": manifest.tokens("train"), "val": manifest.tokens("val")},
        "documents": {"train": manifest.documents("train"), "val": manifest.documents("val")},
        "bad_documents": list(bad_documents),
        "plan": plan,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    durable.publish_json(directory / NAME, facts)
    return manifest


def read(path: Path, where: str) -> Manifest:
    """The manifest in the file `path`, of the data at `where`; DataError where it is none or contradicts itself."""
    facts: Any = durable.read_json(path)
    if not isinstance(facts, dict):
        raise DataError(f"{path} is not JSON; run `gpt2hpc prepare` again")
    try:
        if facts["format"] != FORMAT:
            raise DataError(
                f"{path} is of format {facts['format']}, this version reads {FORMAT}; prepare the data again"
            )
        shards = tuple(Shard(**shard) for shard in facts["shards"])
        manifest = Manifest(where, shards, facts["vocab_size"], facts["plan"])
        if manifest.sha256 != facts["sha256"]:
            raise DataError(f"{path} was edited: its sha256 does not fit its shards; run `gpt2hpc prepare` again")
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged (it lacks {error}); run `gpt2hpc prepare` again") from None
    return manifest
