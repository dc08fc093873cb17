"""`plan.json`: the units of work, fixed once, so that any number of tasks, at any time, make the same shards.

A unit is consecutive pieces of files, about 100M tokens. How many tasks share the units is no part of the plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2hpc import durable
from gpt2hpc.data import hub, tokenizer
from gpt2hpc.data.shards import SPLITS, Split
from gpt2hpc.data.sources import SourceFile
from gpt2hpc.errors import DataError

FORMAT = 1
NAME = "plan.json"
UNIT_TOKENS = 100_000_000
"""A shard of 200 MB."""
BYTES_PER_TOKEN = 4
"""Of English text, rounded down."""
_EXPANSION = 3
"""Text of a compressed byte."""

Separator = Literal["file", "blank-line"]


@dataclass(frozen=True)
class Reading:
    """How files are cut into documents: text at `separator`, records by their `text_key`."""

    separator: Separator = "file"
    text_key: str = "text"


@dataclass(frozen=True)
class Piece:
    """Row groups `start … stop - 1` of a parquet file, lines or paragraphs that begin in these bytes, or all of it."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """What is tokenized together, in order; `bytes` of text, roughly."""

    index: int
    pieces: tuple[Piece, ...]
    bytes: int

    @property
    def files(self) -> set[int]:
        return {piece.file for piece in self.pieces}


@dataclass(frozen=True)
class Plan:
    """All that decides the tokens: the same plan gives the same bytes, on any machine and in any order of units.

    `val_fraction` None makes unit 0 the validation split; else a document is one of validation when the hash of its
    text falls below that fraction.
    """

    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    reading: Reading
    val_fraction: float | None

    @property
    def rules(self) -> dict[str, Any]:
        """All but the sources, as JSON values."""
        return {
            "reading": dataclasses.asdict(self.reading),
            "val_fraction": self.val_fraction,
            "tokenizer": {
                "name": "gpt2",
                "ranks_sha256": tokenizer.RANKS_SHA256,
                "end_of_text": "before each document",
            },
        }

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self.rules,
            "files": [dataclasses.asdict(file) for file in self.files],
            "units": [
                {"bytes": unit.bytes, "pieces": [dataclasses.astuple(piece) for piece in unit.pieces]}
                for unit in self.units
            ],
        }

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Of text, roughly."""
        return sum(unit.bytes for unit in self.units)

    @property
    def commits(self) -> dict[str, str]:
        """The Hub datasets among the sources, each with the commit that it is pinned to."""
        found = [hub.split_path(file.path)[0] for file in self.files if file.is_remote]
        return {dataset.repo: dataset.revision or "" for dataset in found}

    def splits(self, unit: Unit) -> tuple[Split, ...]:
        """The splits that a unit has a shard of."""
        if self.val_fraction is not None:
            return SPLITS
        return ("val",) if unit.index == 0 else ("train",)

    def split_of(self, text: str, unit: Unit) -> Split:
        if self.val_fraction is None:
            return self.splits(unit)[0]
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        return "val" if draw < self.val_fraction else "train"

    def share(self, task: int, tasks: int) -> tuple[Unit, ...]:
        """The units of task `task` of `tasks`: consecutive ones, since neighbours read the same file."""
        count = len(self.units)
        return self.units[task * count // tasks : (task + 1) * count // tasks]


def make(
    files: Sequence[SourceFile], reading: Reading, val_fraction: float | None, *, unit_tokens: int = UNIT_TOKENS
) -> Plan:
    """Cut files into units; of parquet only the footers are read. A single unit gets a fraction, a tenth unless given.

    Raises DataError for a parquet file without the text column, or that is none.
    """
    limit = unit_tokens * BYTES_PER_TOKEN
    groups: list[list[Piece]] = [[]]
    sizes = [0]
    for number, file in enumerate(files):
        for start, stop, size in _cuts(file, reading, limit):
            if groups[-1] and sizes[-1] + size > limit:
                groups.append([])
                sizes.append(0)
            _append(groups[-1], Piece(number, start, stop))
            sizes[-1] += size
    units = tuple(Unit(index, tuple(groups[index]), sizes[index]) for index in range(len(groups)))
    if val_fraction is None and len(units) == 1:
        val_fraction = 0.1
    return Plan(tuple(files), units, reading, val_fraction)


def warnings(plan: Plan, unit_tokens: int) -> list[str]:
    """Units that are much larger than asked for, since their files cannot be cut."""
    limit = 3 * unit_tokens * BYTES_PER_TOKEN
    large = [unit for unit in plan.units if unit.bytes > limit and len(unit.pieces) == 1]
    return [
        f"unit {unit.index} is about {unit.bytes / BYTES_PER_TOKEN / 1e6:,.0f} Mtok, for one process: "
        f"{plan.files[unit.pieces[0].file].path} cannot be cut; make smaller files or row groups of it to share the work"
        for unit in large[:5]
    ]


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Let consecutive row groups be one piece."""
    if pieces and pieces[-1].file == piece.file and pieces[-1].stop == piece.start:
        piece = dataclasses.replace(pieces.pop(), stop=piece.stop)
    pieces.append(piece)


def _cuts(file: SourceFile, reading: Reading, limit: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and text bytes of the least pieces of a file."""
    if file.format == "parquet":
        yield from _row_groups(file, reading.text_key)
        return
    by_range = file.format == "jsonl" or (file.format == "text" and reading.separator == "blank-line")
    if file.compression or not by_range or file.bytes <= limit:
        yield 0, file.bytes, file.bytes * (_EXPANSION if file.compression else 1)
        return
    count = -(-file.bytes // limit)
    edges = [file.bytes * number // count for number in range(count + 1)]
    yield from ((start, stop, stop - start) for start, stop in itertools.pairwise(edges))


def _row_groups(file: SourceFile, text_key: str) -> Iterator[tuple[int, int, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.is_remote:
            footer = hub.read_from(file.path, lambda source: pq.ParquetFile(source).metadata)
        else:
            with Path(file.path).open("rb") as source:
                footer = pq.ParquetFile(source).metadata
    except pa.ArrowInvalid as error:
        raise DataError(f"{file.path} is no parquet file ({' '.join(str(error).split())}); fetch it again") from None
    names = [footer.schema.column(column).path for column in range(footer.num_columns)]
    if text_key not in names:
        raise DataError(f"{file.path} has no column {text_key!r} but {', '.join(names)}; name the text with --text-key")
    column = names.index(text_key)
    for number in range(footer.num_row_groups):
        yield number, number + 1, footer.row_group(number).column(column).total_uncompressed_size


# On disk ------------------------------------------------------------------------------------------------------------


def publish(directory: Path, plan: Plan, asked: Mapping[str, Any]) -> Plan:
    """Write the plan, and what was asked for, unless there is one; returns the one that is there.

    DataError where that is of other sources or rules.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        durable.create_text(
            directory / NAME, durable.to_json({"sha256": plan.sha256, "asked": dict(asked), **plan.facts})
        )
    except OSError as error:
        raise DataError(
            f"--out={directory} cannot be written ({error.strerror}); choose a directory you own, on a disk with space"
        ) from None
    there = load(directory)
    if there.sha256 != plan.sha256:
        differing = [key for key in plan.facts if plan.facts[key] != there.facts[key]]
        raise DataError(
            f"--out={directory} holds data of another plan ({', '.join(differing)} differ); choose another --out, or delete it first"
        )
    return there


def asked_before(directory: Path) -> dict[str, Any] | None:
    """What the plan in `directory` was asked to be; None where there is none."""
    facts: Any = durable.read_json(directory / NAME)
    if not isinstance(facts, dict) and (directory / NAME).exists():
        load(directory)  # tells what is the matter
    return facts.get("asked", {}) if isinstance(facts, dict) else None


def load(directory: Path) -> Plan:
    """Raises DataError where there is no plan, or one that contradicts itself."""
    path = directory / NAME
    facts: Any = durable.read_json(path)
    if facts is None and not path.exists():
        raise DataError(f"{directory} holds no {NAME}; begin with `gpt2hpc prepare --source … --out {directory}`")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        if facts["format"] != FORMAT:
            raise DataError(f"{path} is of format {facts['format']}, this version reads {FORMAT}; prepare anew")
        plan = Plan(
            files=tuple(SourceFile(**file) for file in facts["files"]),
            units=tuple(
                Unit(index, tuple(Piece(*piece) for piece in unit["pieces"]), unit["bytes"])
                for index, unit in enumerate(facts["units"])
            ),
            reading=Reading(**facts["reading"]),
            val_fraction=facts["val_fraction"],
        )
        if plan.sha256 == facts["sha256"]:
            return plan
    raise DataError(
        f"{path} is damaged, was edited, or is of another version; restore it, or prepare into another --out"
    )
