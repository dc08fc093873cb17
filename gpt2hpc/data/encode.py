"""A unit's documents into shards, and, once all units are done, the manifest: deterministic, resumable, without a merge.

A unit is done when its record `unit_NNNNNN.json`, written last, belongs to the plan and its shards have the sizes that it names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.data import manifest, readers, shards, tokenizer
from gpt2hpc.data.backends import Backend
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.plan import Plan, Unit, asked_before
from gpt2hpc.data.readers import Bad
from gpt2hpc.data.shards import SPLITS, Shard, ShardWriter, Split, Tokens
from gpt2hpc.data.sources import SourceFile, check_unchanged
from gpt2hpc.errors import DataError

Locate = Callable[[SourceFile], Path]
Count = Callable[[int, int], None]
"""Told of characters and tokens as they are done."""

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Record:
    """What a unit became: its shards, the documents that could not be read, and who made it."""

    plan_sha256: str
    shards: tuple[Shard, ...]
    bad: tuple[Bad, ...]
    made: dict[str, Any]


def record_path(directory: Path, unit: Unit) -> Path:
    return directory / f"unit_{unit.index:06d}.json"


def done(directory: Path, plan: Plan, unit: Unit) -> Record | None:
    """The unit's record if it is done."""
    facts = durable.read_json(record_path(directory, unit))
    if not isinstance(facts, dict) or facts.get("plan_sha256") != plan.sha256:
        return None
    record = Record(
        facts["plan_sha256"],
        tuple(Shard(**shard) for shard in facts["shards"]),
        tuple(Bad(**bad) for bad in facts["bad"]),
        facts["made"],
    )
    return record if all(shards.has_size(directory / shard.file, shard) for shard in record.shards) else None


def missing(directory: Path, plan: Plan, units: Sequence[Unit]) -> list[Unit]:
    return [unit for unit in units if done(directory, plan, unit) is None]


def encode_unit(
    directory: Path,
    plan: Plan,
    unit: Unit,
    *,
    backend: Backend,
    locate: Locate,
    max_bad_documents: int = 0,
    made: dict[str, Any] | None = None,
    count: Count = lambda characters, tokens: None,
) -> Record | None:
    """Tokenize a unit and publish its shards, then its record; None if somebody else has done so, at the start or by then.

    Raises DataError at more than `max_bad_documents` documents that cannot be read, or at a source that has changed.
    """
    if done(directory, plan, unit):
        return None
    try:
        return _encode(directory, plan, unit, backend, locate, max_bad_documents, made or {}, count)
    except (DataError, FileNotFoundError):
        if done(directory, plan, unit):  # and so our source was freed, or our half-written file cleared away
            return None
        raise


def _encode(
    directory: Path,
    plan: Plan,
    unit: Unit,
    backend: Backend,
    locate: Locate,
    max_bad_documents: int,
    made: dict[str, Any],
    count: Count,
) -> Record | None:
    bad: list[Bad] = []
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(directory, split=split, unit=unit.index))
            for split in plan.splits(unit)
        }
        for batch in _batches(_documents(plan, unit, locate)):
            bad += (each for each in batch if isinstance(each, Bad))
            check_bad(bad, max_bad_documents)
            texts = [each for each in batch if isinstance(each, str)]
            encoded = backend.encode(texts)
            of_split: dict[Split, list[Tokens]] = {split: [] for split in writers}
            for text, tokens in zip(texts, encoded, strict=True):
                of_split[plan.split_of(text, unit)].append(tokens)
            for split, writer in writers.items():
                writer.append(of_split[split])
            count(sum(map(len, texts)), sum(map(len, encoded)))
        if done(directory, plan, unit):
            return None
        written = tuple(writer.publish() for writer in writers.values())
    record = Record(plan.sha256, written, tuple(bad), {"tokenizer": backend.name, **made})
    durable.publish_json(record_path(directory, unit), dataclasses.asdict(record))
    return record


def has_both_splits(directory: Path, plan: Plan) -> bool:
    """Whether the units that are done have documents of either split already, so that they can be trained on in the end."""
    found: set[Split] = set()
    for unit in plan.units:
        record = done(directory, plan, unit)
        found |= {shard.split for shard in record.shards if shard.documents} if record else set()
        if len(found) == len(SPLITS):
            return True
    return False


def _documents(plan: Plan, unit: Unit, locate: Locate) -> Iterator[readers.Document]:
    for piece in unit.pieces:
        file = plan.files[piece.file]
        local = locate(file)
        check_unchanged(local, file)
        yield from readers.documents(file, local, piece, plan.reading)


def _batches(documents: Iterator[readers.Document]) -> Iterator[list[readers.Document]]:
    """About a million characters at once, so that a batch costs little beside its documents; one that is bad is told at once."""
    batch: list[readers.Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document) if isinstance(document, str) else _BATCH_CHARACTERS
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def check_bad(bad: Sequence[Bad], limit: int) -> None:
    """Raise DataError for more documents that cannot be read than are allowed."""
    if len(bad) <= limit:
        return
    first = f"{bad[0].where} {bad[0].why}"
    if limit == 0:
        raise DataError(f"{first}, or allow a number of such documents with --max-bad-documents")
    raise DataError(f"{len(bad)} documents cannot be read, --max-bad-documents={limit} are allowed; the first: {first}")


def finalize(directory: Path, plan: Plan, max_bad_documents: int = 0) -> Manifest:
    """Write the manifest once every unit is done; DataError names those that are not."""
    records = [(unit.index, done(directory, plan, unit)) for unit in plan.units]
    lacking = [index for index, record in records if record is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(records)} units in {directory} are not done ({ranges(lacking)}); "
            f"run `gpt2hpc prepare --out {directory}`, or submit the array again: that does these alone"
        )
    found = [record for _, record in records if record]
    bad = [each for record in found for each in record.bad]
    check_bad(bad, max_bad_documents)
    written = [shard for record in found for shard in record.shards]
    _check_splits(written, plan)
    published = manifest.publish(
        directory,
        written,
        vocab_size=tokenizer.VOCAB_SIZE,
        plan={
            "sha256": plan.sha256,
            "sources": [_public(source) for source in (asked_before(directory) or {}).get("source", [])],
            "commits": plan.commits,
            **plan.rules,
        },
        bad_documents=[dataclasses.asdict(each) for each in bad],
    )
    for path in durable.leftovers(directory):  # of writers that were killed; one that still writes finds its unit done
        if path.name.startswith((".train_", ".val_", ".unit_")):
            path.unlink(missing_ok=True)
    return published


def _public(source: str) -> str:
    """A manifest may be published: of local paths it tells the last part."""
    return source if not source.startswith("/") else Path(source).name


def _check_splits(written: Sequence[Shard], plan: Plan) -> None:
    """Raise DataError where a split got nothing."""
    total = sum(shard.documents or 0 for shard in written)
    for wanted in SPLITS:
        if not any(shard.documents for shard in written if shard.split == wanted):
            if total < 2:
                raise DataError(
                    f"--source holds {total} documents, and training and validation need one each; add text, or let "
                    "--document-separator blank-line make documents of the paragraphs"
                )
            raise DataError(
                f"none of the {total} documents fell to the {wanted} split; add text, or change "
                f"--val-fraction={plan.val_fraction}"
            )


def ranges(numbers: Sequence[int]) -> str:
    """`3, 7, 9-21`: ascending numbers, shortened."""
    runs = [
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:12], "…"])
