"""Logs as curves: a run's metrics.jsonl or log.txt, and the `step kind value` text of others.

A step that stands twice (a log that went on after a restart) counts as it was last. Lines that hold nothing known are skipped
and counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2hpc.errors import DataError
from gpt2hpc.run_dir import RunDir

Series = Sequence[tuple[int, float]]
"""Step and value, by rising step; finite values only."""

KINDS = {
    "train": "training loss",
    "val": "validation loss",
    "hella": "HellaSwag acc_norm",
}
"""What a `step kind value` line may be of."""

FIELDS = {
    "loss": "train",
    "val_loss": "val",
    "hellaswag_acc_norm": "hella",
    "hellaswag_acc": "hella_acc",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "tokens_per_s": "tokens_per_s",
    "mfu": "mfu",
}
"""Keys of metrics.jsonl, and the kinds that they are here."""


@dataclass(frozen=True)
class Curves:
    """The curves of one log, by kind; `blank`, `skipped` and `nonfinite` count lines, and values that are no numbers."""

    name: str
    path: Path
    series: Mapping[str, Series]
    blank: int = 0
    skipped: int = 0
    nonfinite: int = 0

    def of(self, kind: str) -> Series:
        return self.series.get(kind, ())

    @property
    def remarks(self) -> str:
        """What was left out, in words; empty where nothing was."""
        counts = {"blank": self.blank, "of another form": self.skipped, "not finite": self.nonfinite}
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{self.path}: lines left out: {told}" if told else ""


def read(path: Path) -> Curves:
    """The curves of a run directory, or of a log file; DataError where there is none, or nothing in it."""
    file = _log_of(path)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise DataError(f"{file} is not there; give a run directory, its log.txt or its metrics.jsonl") from None
    found = parse(text, name=_name(path), path=file)
    if not found.series:
        raise DataError(f"{file} holds no line such as `0 val 10.95` or of metrics.jsonl; give the log of a training")
    return found


def read_all(paths: Sequence[Path]) -> list[Curves]:
    """The same of several; those that would have the same name get their whole path."""
    found = [read(path) for path in paths]
    names = [curves.name for curves in found]
    return [
        dataclasses.replace(curves, name=str(path)) if names.count(curves.name) > 1 else curves
        for path, curves in zip(paths, found, strict=True)
    ]


def parse(text: str, *, name: str, path: Path) -> Curves:
    """The curves in a text of either form, or of both."""
    points: dict[str, dict[int, float]] = {}
    blank = skipped = nonfinite = 0
    for line in text.splitlines():
        if not line.strip():
            blank += 1
            continue
        try:
            facts = list(_facts(line))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            skipped += 1
            continue
        for step, kind, value in facts:
            if math.isfinite(value):
                points.setdefault(kind, {})[step] = value
            else:
                nonfinite += 1
    series = {kind: tuple(sorted(values.items())) for kind, values in points.items()}
    return Curves(name, path, series, blank, skipped, nonfinite)


def smoothed(series: Series, over: int) -> Series:
    """Each value as the mean of itself and the `over - 1` values before it, as far as there are that many."""
    total, averaged = 0.0, []
    for index, (step, value) in enumerate(series):
        total += value
        if index >= over:
            total -= series[index - over][1]
        averaged.append((step, total / min(index + 1, over)))
    return averaged


def _facts(line: str) -> Iterator[tuple[int, str, float]]:
    """Step, kind and value of what is known in a line; ValueError and its like where the line is of no known form."""
    if line.lstrip().startswith("{"):
        facts = json.loads(line)
        step = _step(facts["step"])
        for key, kind in FIELDS.items():
            if key in facts:
                yield step, kind, _number(facts[key])
        return
    step_text, kind, value = line.split()
    step, number = _step(int(step_text)), float(value)
    if kind in KINDS:
        yield step, kind, number
    elif kind not in ("save",):
        raise ValueError(kind)


def _step(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    """A value of metrics.jsonl, where null stands for one that is not finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value)


def _log_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    run = RunDir(path)
    there = [file for file in (run.metrics, run.log) if file.exists() and file.stat().st_size]
    return there[0] if there else run.log


def _name(path: Path) -> str:
    own = RunDir(path).log.name, RunDir(path).metrics.name
    whole = path.resolve()
    if path.is_dir():
        return whole.name
    return whole.parent.name if path.name in own else whole.stem
