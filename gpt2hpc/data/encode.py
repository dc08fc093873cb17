"""From units to shards to a manifest: deterministic, resumable unit by unit, and without a merge."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2hpc import durable
from gpt2hpc.data import manifest, shards, tokenizer
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.shards import Shard, Split, Tokens
from gpt2hpc.data.sources import Reading, Unit, documents
from gpt2hpc.errors import DataError


@dataclass(frozen=True)
class Plan:
    """All that decides the tokens: the same plan gives the same bytes, on any machine and in any order of units.

    `val_fraction` None makes unit 0 the validation split; else a document is one of validation when the hash of its
    text falls below that fraction.
    """

    units: tuple[Unit, ...]
    reading: Reading
    val_fraction: float | None

    @property
    def facts(self) -> dict[str, Any]:
        """The plan as JSON values, for the manifest."""
        return {
            "units": [[dataclasses.asdict(file) for file in unit.files] for unit in self.units],
            "reading": dataclasses.asdict(self.reading),
            "val_fraction": self.val_fraction,
            "tokenizer": {
                "name": "gpt2",
                "ranks_sha256": tokenizer.RANKS_SHA256,
                "end_of_text": "before each document",
            },
        }

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def splits(self, unit: Unit) -> tuple[Split, ...]:
        """The splits that a unit has a shard of."""
        if self.val_fraction is not None:
            return ("train", "val")
        return ("val",) if unit.index == 0 else ("train",)

    def split_of(self, text: str, unit: Unit) -> Split:
        if self.val_fraction is None:
            return self.splits(unit)[0]
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        return "val" if draw < self.val_fraction else "train"


def make_plan(units: Sequence[Unit], reading: Reading, val_fraction: float | None) -> Plan:
    """A fraction is needed where there is one unit only; a tenth then, unless given."""
    if val_fraction is None and len(units) == 1:
        val_fraction = 0.1
    return Plan(tuple(units), reading, val_fraction)


def check_target(directory: Path, plan: Plan) -> None:
    """Raise DataError if the directory cannot be written or already holds other data."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out={directory} cannot be made ({error.strerror}); choose a directory you own") from None
    existing = durable.read_json(directory / manifest.NAME)
    if existing and existing.get("plan") != plan.facts:
        raise DataError(
            f"--out={directory} holds data of another source or rule; choose another --out, or delete it first"
        )


def done_unit(directory: Path, plan: Plan, unit: Unit) -> list[Shard] | None:
    """The unit's shards if all are on disk, complete and of this plan."""
    paths = [directory / shards.shard_name(split, unit.index) for split in plan.splits(unit)]
    done = [shards.done_shard(path, plan.sha256) for path in paths]
    return [shard for shard in done if shard] if all(done) else None


def encode_unit(directory: Path, plan: Plan, unit: Unit) -> list[Shard]:
    """Tokenize a unit and write its shards."""
    tokens: dict[Split, list[Tokens]] = {split: [] for split in plan.splits(unit)}
    for text in documents(unit, plan.reading):
        tokens[plan.split_of(text, unit)].append(tokenizer.encode_document(text))
    return [
        shards.write_shard(
            directory,
            split=split,
            unit=unit.index,
            tokens=np.concatenate([np.empty(0, dtype=np.uint16), *arrays]),
            documents=len(arrays),
            plan_sha256=plan.sha256,
        )
        for split, arrays in tokens.items()
    ]


def finalize(directory: Path, plan: Plan) -> Manifest:
    """Write the manifest once every unit is done; DataError names the first that is not."""
    found: list[Shard] = []
    for unit in plan.units:
        for split in plan.splits(unit):
            name = shards.shard_name(split, unit.index)
            shard = shards.done_shard(directory / name, plan.sha256)
            if shard is None:
                raise DataError(f"{directory / name} is not done; run `gpt2hpc prepare` again")
            found.append(shard)
    for wanted in shards.SPLITS:
        if not any(shard.documents for shard in found if shard.split == wanted):
            total = sum(shard.documents for shard in found)
            if total < 2:
                raise DataError(
                    f"--source holds {total} documents, and training and validation need one each; add text, or let "
                    "--document-separator blank-line make documents of the paragraphs"
                )
            raise DataError(
                f"none of the {total} documents fell to the {wanted} split; add text, or change "
                f"--val-fraction={plan.val_fraction}"
            )
    return manifest.publish(directory, found, vocab_size=tokenizer.VOCAB_SIZE, plan=plan.facts)
