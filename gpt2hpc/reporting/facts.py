"""What the files of a run tell: its attempts, what was computed twice, what it cost, where and with what it ran.

No torch, no network; a run that goes on at this moment is read as it stands.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from gpt2hpc import config_io
from gpt2hpc.cluster.ledger import Attempt, Ledger
from gpt2hpc.cluster.slurm import expand_nodes
from gpt2hpc.errors import DataError
from gpt2hpc.reporting import curves
from gpt2hpc.reporting.curves import Curves
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint

SAMPLES_SHOWN = 12
SAMPLE_CHARACTERS = 4000


@dataclass(frozen=True)
class Start:
    """One attempt. `resumed` is the step it began at, `reached` the last one it is known to have computed.

    `repeated` counts its steps that a later attempt computed again; None where nobody knows. `assumed` says where its
    end was taken from, if it did not write one itself.
    """

    attempt: Attempt
    resumed: int
    reached: int | None
    repeated: int | None
    seconds: float | None
    assumed: str

    @property
    def cause(self) -> str:
        return self.attempt.cause_words


@dataclass(frozen=True)
class Restart:
    """A start after the first: the step it went on from, and why the one before had ended."""

    number: int
    step: int
    cause: str


@dataclass(frozen=True)
class RunFacts:
    """A run, for a report. `config` holds dotted keys; `versions` what the newest checkpoint was written with."""

    name: str
    run: RunDir
    curves: Curves
    starts: Sequence[Start]
    unclaimed: int
    config: dict[str, Any]
    config_text: str
    versions: dict[str, str]
    samples: Sequence[tuple[str, str]]
    sample_files: int

    @property
    def restarts(self) -> list[Restart]:
        pairs = zip(self.starts, self.starts[1:], strict=False)
        return [Restart(later.attempt.number, later.resumed, earlier.cause) for earlier, later in pairs]

    @property
    def step(self) -> int:
        """The last step that is logged or saved."""
        logged = [series[-1][0] for series in self.curves.series.values()]
        return max([0, *logged, *(start.attempt.saved_step for start in self.starts)])

    @property
    def rank_hours(self) -> float:
        return sum((start.seconds or 0.0) * start.attempt.world_size for start in self.starts) / 3600

    @property
    def hour_unit(self) -> str:
        """What an hour of a rank is: a GPU's, or a process's on a CPU."""
        device = self.config.get("train.device")
        if device == "cuda" or self.curves.of("mfu"):
            return "GPU-hours"
        return "process-hours (CPU)" if device == "cpu" else "process-hours"

    @property
    def repeated(self) -> int:
        return sum(start.repeated or 0 for start in self.starts)

    @property
    def unknown_ends(self) -> int:
        """Attempts of which nobody knows how far they had got past their last save."""
        return sum(start.repeated is None for start in self.starts)

    @property
    def nodes(self) -> Counter[str]:
        """How many attempts each node took part in."""
        return Counter(node for start in self.starts for node in _nodes(start.attempt))


def read(path: Path, *, now: datetime | None = None) -> RunFacts:
    """All of that; DataError where there is no log in the directory."""
    run, ledger = RunDir(path), Ledger(RunDir(path))
    text, config = _config(run)
    samples = sorted(run.samples.glob("*.txt"), key=lambda file: (_numbers(file.stem), file.name))
    return RunFacts(
        name=run.name,
        run=run,
        curves=_curves(run),
        starts=starts(ledger, now=now or datetime.now(UTC)),
        unclaimed=len(ledger.unclaimed()),
        config=config,
        config_text=text,
        versions=_versions(run),
        samples=[(file.stem, _text(file, SAMPLE_CHARACTERS)) for file in _spread(samples, SAMPLES_SHOWN)],
        sample_files=len(samples),
    )


def told_apart(found: Sequence[RunFacts]) -> list[RunFacts]:
    """The same, with whole paths where two have the same name."""
    names = [run.name for run in found]
    return [dataclasses.replace(run, name=str(run.run.path)) if names.count(run.name) > 1 else run for run in found]


def starts(ledger: Ledger, *, now: datetime) -> list[Start]:
    """The attempts in their order, with what follows from the next one and from their signs of life."""
    attempts = ledger.attempts()
    found: list[Start] = []
    saved = 0
    for index, attempt in enumerate(attempts):
        following = next((each for each in attempts[index + 1 :] if _began(each, max(saved, attempt.saved_step))), None)
        began = _began(attempt, saved)
        resumed = attempt.first_step if began else saved
        saved = max(saved, attempt.saved_step)
        reached, repeated = attempt.last_step, None
        if not began:
            reached, repeated = resumed, 0
        elif following is None:
            repeated = 0
        else:
            if following.repeats is not None:
                reached = max(reached or 0, following.first_step + following.repeats)
            repeated = None if reached is None else max(0, reached - following.first_step)
        seconds, assumed = _lasted(ledger, attempt, attempts[index + 1 : index + 2], now)
        found.append(Start(attempt, resumed, reached, repeated, seconds, assumed))
    return found


def _began(attempt: Attempt, saved: int) -> bool:
    """Whether it got as far as to say where it goes on: one that died before has zeros where others have saved steps."""
    return attempt.first_step > 0 or saved == 0


def _lasted(ledger: Ledger, attempt: Attempt, following: Sequence[Attempt], now: datetime) -> tuple[float | None, str]:
    """Seconds from start to end, and where the end was taken from if it is not written."""
    began, ended, assumed = _time(attempt.started), _time(attempt.ended), ""
    if began is None:
        return None, "no start is written"
    if ended is None:
        beat = ledger.last_beat(attempt)
        if not following and ledger.seems_alive(attempt):
            ended, assumed = now, "still running"
        elif beat is not None:
            ended, assumed = datetime.fromtimestamp(beat, UTC), "its last sign of life"
        elif following:
            ended, assumed = _time(following[0].started), "the next start"
    if ended is None:
        return None, "no end is known"
    return max(0.0, (ended - began).total_seconds()), assumed


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def _curves(run: RunDir) -> Curves:
    """A run that has logged nothing yet has no curves, but attempts that may tell why."""
    try:
        return curves.read(run.path)
    except DataError:
        if not run.attempts.is_dir():
            raise
        return Curves(run.name, run.metrics, {})


def _config(run: RunDir) -> tuple[str, dict[str, Any]]:
    """The text of config.yaml and its dotted keys; no keys where it is damaged."""
    text = _text(run.config, 100_000) if run.config.exists() else ""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None
    return text, dict(config_io.flat(tree)) if isinstance(tree, dict) else {}


def _versions(run: RunDir) -> dict[str, str]:
    """Of the newest checkpoint whose manifest is whole."""
    for found in checkpoint.found(run.checkpoints):
        facts = found.manifest()
        if isinstance(facts.get("versions"), dict):
            return {
                **{str(name): str(version) for name, version in facts["versions"].items()},
                "ranks": str(facts.get("world_size", "")),
                "threads a rank": str(facts.get("threads", "")),
                "checkpoint": found.path.name,
            }
    return {}


def _nodes(attempt: Attempt) -> list[str]:
    try:
        return expand_nodes(attempt.nodes)
    except ValueError:
        return [attempt.nodes]


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _spread(files: Sequence[Path], most: int) -> list[Path]:
    """At most that many, the first and the last among them, evenly between."""
    if len(files) <= most:
        return list(files)
    return [files[round(index * (len(files) - 1) / (most - 1))] for index in range(most)]


def _text(path: Path, most: int) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= most else f"{text[:most]} …"
