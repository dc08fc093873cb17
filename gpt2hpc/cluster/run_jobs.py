"""Which of Slurm's jobs are a run's, and where they write.

Known are the jobs that `submit` submitted, those that the run's own `resume.sh` did (guards too), those that an attempt or a decision
names, and those whose script has started: it appends a line `JOB PATH`, its log, to `RUN/slurm/logs`.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from gpt2hpc.cluster import queries
from gpt2hpc.cluster.ledger import Decision, Ledger
from gpt2hpc.cluster.queries import Queued
from gpt2hpc.run_dir import RunDir

NUMBER = re.compile(r"\d+(_\d+)?")
"""Of a batch job, or of a task of an array: a local job has none, and an odd line in a file must not spoil the question to Slurm."""


def numbers(run: RunDir) -> set[str]:
    """Their numbers, `J` or `A_a`, those that are over included."""
    ledger = Ledger(run)
    named = {each.job for each in (*ledger.attempts(), ledger.decision()) if each is not None}
    known = named | set(logs(run)) | submitted(run.slurm) | set(_lines(run.jobs))
    return {number for number in known if NUMBER.fullmatch(number)}


def after(run: RunDir) -> set[str]:
    """The numbers of jobs that come after the training, and are no part of it: a pipeline's evaluation and export."""
    known = set(_lines(run.dependents)).union(*map(submitted, run.after.glob("*")))
    return {number for number in known if NUMBER.fullmatch(number)}


def successor(run: RunDir, number: str) -> str | None:
    """The last of its jobs that was submitted after that one; None where none is known."""
    return max((each for each in numbers(run) if order(each) > order(number)), key=order, default=None)


def submitted(folder: Path) -> set[str]:
    """The numbers of jobs that were submitted with their pickles in `folder`."""
    return {path.name.split("_")[0] for path in folder.glob("*_submitted.pkl")}


def logs(run: RunDir) -> dict[str, Path]:
    """The log of each job whose script has started and has said where that is, the first job first."""
    found = {}
    for line in _lines(run.job_logs):
        number, _, path = line.partition(" ")
        if path.strip():
            found[number] = Path(path.strip())
    return found


def guards(run: RunDir) -> set[str]:
    """Those of them that wait only for another one to fail."""
    return {line.split()[0] for line in _lines(run.guard)}  # and the job that it guards


def order(number: str) -> tuple[int, ...]:
    """For sorting: the later job is the greater."""
    return tuple(int(part) for part in number.split("_") if part.isdecimal())


def live(run: RunDir) -> list[Queued]:
    """Those that wait or run, asked of Slurm now; none where there is no Slurm."""
    return _live(numbers(run))


def live_after(run: RunDir) -> list[Queued]:
    """The same of those that come after the training."""
    return _live(after(run))


def _live(known: set[str]) -> list[Queued]:
    return [row for number, row in (queries.queue(known) or {}).items() if number in known and row.is_live]


def note_end(run: RunDir, number: str, *, action: str, reason: str) -> None:
    """Keep for `gpt2hpc status` that somebody has ended the run's job from outside, where the job itself may get no time to."""
    newest = Ledger(run).newest()
    job, restart = (newest.job, newest.restart) if newest else (number, 0)
    Ledger(run).remember(Decision(job, restart, action, reason))


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return []
