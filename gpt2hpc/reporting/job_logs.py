"""What a run's jobs have printed: which files, which lines of them belong to which attempt and rank.

    RUN/slurm/logs                      where the log of each batch job is: its script writes that
    RUN/slurm/JOB_RANK_log.out          a rank of `gpt2hpc submit`; rank 0's is also the batch script's
    RUN/logs/JOB_RESTART_rankRANK.log   a rank of a local job; rank 0 has the terminal

A restart goes on in the same file. There an attempt begins with `attempt N: …`, and ends with what was decided after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc.cluster import queries, run_jobs
from gpt2hpc.cluster.ledger import Attempt, Ledger
from gpt2hpc.run_dir import RunDir

_BEGINS = re.compile(r"(?:\d+: )?attempt (\d+): job ")
_ENDS = re.compile(r"gpt2hpc: job \S+: (?:requeue|resubmit|exit|cannot decide)\b")
_RANK_FILE = re.compile(r"(?P<job>\d+(?:_\d+)?)_(?P<rank>\d+)_log\.out")
_LABEL = re.compile(r"\s*(\d+): ")
"""What `srun --label` puts before each line of a rank."""


@dataclass(frozen=True)
class JobLog:
    """A file that a job, or one rank of it, prints to; `rank` None where all do, `restart` None where every restart does."""

    path: Path
    job: str
    rank: int | None = None
    restart: int | None = None


def found(run: RunDir, *, ask_slurm: bool = True) -> list[JobLog]:
    """All that are there, the oldest job first."""
    logs = {log.path: log for log in (*_of_batch_jobs(run, ask_slurm=ask_slurm), *_of_ranks(run), *_of_local_jobs(run))}
    there = [log for log in logs.values() if log.path.is_file() and (log.rank in (0, None) or log.path.stat().st_size)]
    began = list(dict.fromkeys(attempt.job for attempt in Ledger(run).attempts()))
    return sorted(
        there, key=lambda log: (_place(log.job, began), log.restart or 0, -1 if log.rank is None else log.rank)
    )


def _place(job: str, began: Sequence[str]) -> tuple[float, tuple[int, ...]]:
    """Of a job among those that made attempts; one that made none is before the next higher number, or the last."""
    if job in began:
        return began.index(job), ()
    later = (index for index, other in enumerate(began) if run_jobs.order(other) > run_jobs.order(job))
    return next(later, len(began)) - 0.5, run_jobs.order(job)


def _of_batch_jobs(run: RunDir, *, ask_slurm: bool) -> Iterator[JobLog]:
    told = run_jobs.logs(run)
    for job, path in told.items():
        yield JobLog(path, job, rank=0 if _RANK_FILE.fullmatch(path.name) else None)
    if ask_slurm:
        for job in run_jobs.numbers(run) - set(told):
            if not (run.slurm / f"{job}_0_log.out").exists() and (asked := queries.job_log(job)) is not None:
                yield JobLog(asked, job)


def _of_ranks(run: RunDir) -> Iterator[JobLog]:
    for path in run.slurm.glob("*_log.out"):
        if named := _RANK_FILE.fullmatch(path.name):
            yield JobLog(path, named["job"], rank=int(named["rank"]))


def _of_local_jobs(run: RunDir) -> Iterator[JobLog]:
    for path in run.rank_logs.glob("*.log"):
        if named := re.fullmatch(r"(?P<job>.+)_(?P<restart>\d+)_rank(?P<rank>\d+)\.log", path.name):
            yield JobLog(path, named["job"], rank=int(named["rank"]), restart=int(named["restart"]))


def lines(log: JobLog) -> list[str]:
    """All that are whole, or not yet."""
    return own(log, log.path.read_text(encoding="utf-8", errors="replace").splitlines())


def own(log: JobLog, lines: list[str]) -> list[str]:
    """Without the word of submitit that each rank of a job has started, and so on, but for rank 0's."""
    return lines if log.rank in (0, None) else [line for line in lines if not line.startswith("submitit INFO")]


def of_attempt(log: JobLog, attempt: Attempt, attempts: Sequence[Attempt]) -> list[str]:
    """The lines of one attempt, with what its job printed before it began."""
    if log.job != attempt.job or log.restart not in (None, attempt.restart):
        return []
    if log.restart is not None:
        return lines(log)
    parts = _parts(lines(log))
    named = [part for number, part in parts if number == attempt.number]
    if named:
        return named[0]
    starts = [each for each in attempts if each.job == log.job]
    if all(number is None for number, _ in parts) and len(parts) == len(starts):
        return parts[starts.index(attempt)][1]
    return []


def _parts(lines: Sequence[str]) -> list[tuple[int | None, list[str]]]:
    """The lines of each start, with the number of its attempt where it says that."""
    parts: list[tuple[int | None, list[str]]] = [(None, [])]
    ended = False
    for line in lines:
        begins = _BEGINS.match(line)
        if ended or (begins and parts[-1][0] is not None):
            parts.append((None, []))
        number, part = parts[-1]
        part.append(line)
        parts[-1] = (int(begins[1]) if begins else number, part)
        ended = bool(_ENDS.match(line))
    return [each for each in parts if each[1]]


def of_rank(log: JobLog, lines: Sequence[str], rank: int) -> list[str]:
    """The lines of one rank: of its own file, or as they are labelled in one for all."""
    if log.rank is not None:
        return list(lines) if log.rank == rank else []
    return [line[label.end() :] for line in lines if (label := _LABEL.match(line)) and int(label[1]) == rank]
