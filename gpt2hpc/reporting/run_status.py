"""A run as it stands: what its files say, and what Slurm says of its jobs, of which it is asked once for all runs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from gpt2hpc import config_io
from gpt2hpc.cluster import queries, reasons, run_jobs, slurm
from gpt2hpc.cluster.ledger import Attempt, Ledger
from gpt2hpc.cluster.queries import Accounted, Queued
from gpt2hpc.config import Config
from gpt2hpc.errors import ConfigError, RunDirError
from gpt2hpc.reporting import outlook, run_state
from gpt2hpc.reporting.outlook import Logged
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, uploads
from gpt2hpc.training.uploads import Lag

ASK_SLURM_S = 30.0
"""Seconds between two questions to Slurm, whose controller serves a whole cluster."""


@dataclass(frozen=True)
class Answers:
    """Slurm's, of the jobs of all runs, at the Unix time `asked`: `queue` is None where there is no Slurm, or it does not answer."""

    queue: Mapping[str, Queued] | None = None
    accounts: Mapping[str, Accounted] = field(default_factory=dict)
    asked: float = 0.0


@dataclass(frozen=True)
class RunStatus:
    """A run; `loss` and `val_loss` are the last logged ones in nats, `pid` is rank 0's while it runs.

    `waits` is why its job waits, in words; `expected_start` Slurm's own guess; `next` the command to give now.
    `eta_s` counts running only, `jobs_needed` further jobs. `restarts` counts the causes of the starts after the first.
    `uploads` is how far the Hub is behind, of a run that uploads its checkpoints.
    """

    run: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    val_loss: float | None
    attempts: int
    pid: int | None
    detail: str
    uploads: Lag | None = None
    path: str = ""
    job: str | None = None
    nodes: str | None = None
    slurm_state: str | None = None
    slurm_reason: str | None = None
    waits: str | None = None
    expected_start: str | None = None
    left_s: float | None = None
    limit_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    eta_s: float | None = None
    jobs_needed: int | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    excluded: Sequence[str] = ()
    suspects: Sequence[str] = ()
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    next: str | None = None


def ask(runs: Iterable[RunDir]) -> Answers:
    """One squeue for all of them, and one sacct for those of their jobs that neither wait nor run.

    Where that keeps no accounts, scontrol is asked about a job that failed and did not say why.
    """
    runs = list(runs)
    numbers = set().union(*(run_jobs.numbers(run) for run in runs))
    asked, queue = time.time(), queries.queue(numbers, ended=True)
    if queue is None:
        return Answers()
    accounts = queries.accounts(number for number in numbers if number not in queue or not queue[number].is_live)
    for run in runs:
        job, decision = _current(run, queue), Ledger(run).decision()
        said = decision is not None and job is not None and decision.job == job.number
        if job is not None and job.state == "FAILED" and job.number not in accounts and not said:
            accounts |= queries.as_accounted(job.number)
    return Answers(queue, accounts, asked)


class Inquiry:
    """Slurm's answers for whoever looks again and again; it is not asked as often as that."""

    def __init__(self) -> None:
        self.answers = Answers()
        self._asked = -math.inf

    def renew(self, runs: Iterable[RunDir]) -> bool:
        """Ask about these runs if it is time to; whether it was."""
        if time.monotonic() - self._asked < ASK_SLURM_S:
            return False
        self.answers, self._asked = ask(runs), time.monotonic()
        return True


def read_status(run: RunDir, answers: Answers | None = None) -> RunStatus:
    """A run as its files and, if they are given, Slurm's answers say."""
    answers, ledger, config = answers or Answers(), Ledger(run), _config(run)
    attempts, logged = ledger.attempts(), outlook.read(run.metrics)
    steps = config.train.steps if config else None
    step = max(logged.step, attempts[-1].saved_step if attempts else 0)  # what is logged lags behind
    job = _current(run, answers.queue or {})
    if attempts and (_unix(attempts[-1].started) or 0.0) > answers.asked:  # Slurm's word is older than that
        job = None
    state = run_state.judge(run, ledger, attempts, steps, job, answers.accounts)
    live = job if job is not None and job.is_live else None
    running = state.word == "running"
    saved_step, age_s = _last_save(run)
    status = RunStatus(
        run=run.name,
        path=str(run.path),
        state=state.word,
        detail=state.detail,
        next=state.next and state.next.replace("RUN", shlex.quote(str(run.path))),
        step=step,
        steps=steps,
        loss=logged.loss,
        val_loss=logged.val_loss,
        attempts=len(attempts),
        pid=attempts[-1].pid if attempts and running else None,
        uploads=uploads.lag(run, config.checkpoint.repo) if config and config.checkpoint.repo else None,
        job=job.number if job else attempts[-1].job if attempts else None,
        nodes=(live.nodes if live else attempts[-1].nodes if attempts and running else "") or None,
        slurm_state=job.state if job else None,
        slurm_reason=job.reason if job and job.reason not in ("", "None") else None,
        waits=reasons.waits(job.reason) if job and job.is_waiting else None,
        expected_start=live.start.replace("T", " ") if live and live.is_waiting and live.start[:1].isdigit() else None,
        left_s=slurm.seconds(live.left) if live and live.state == "RUNNING" and state.word != "ending" else None,
        limit_s=slurm.seconds(job.limit) if job else None,
        tokens_per_s=logged.tokens_per_s,
        mfu=logged.mfu,
        restarts=dict(Counter(each.cause_words for each in attempts[:-1])),
        excluded=slurm.expand_nodes(live.excluded) if live else (),
        suspects=sorted({node for each in attempts for node in each.suspects}),
        checkpoint_step=saved_step,
        checkpoint_age_s=age_s,
    )
    return status if config is None else _with_outlook(status, config, logged, attempts, live)


def _current(run: RunDir, queue: Mapping[str, Queued]) -> Queued | None:
    """The job that works on the run, or waits to; else the last one that did, as long as Slurm remembers it. No guard's before that,
    and none that was refused because another one worked on the run."""
    known, guards = run_jobs.numbers(run), run_jobs.guards(run)
    rows = [row for number, row in queue.items() if number in known]
    live = [row for row in rows if row.is_live]
    if live:
        return max(live, key=lambda row: (not row.is_waiting, row.number not in guards, run_jobs.order(row.number)))
    over = [row for row in rows if row.number not in guards and not _was_in_its_way(run, row.number)]
    return max(over, key=lambda row: run_jobs.order(row.number), default=None)


def _was_in_its_way(run: RunDir, number: str) -> bool:
    """Whether the job was a second one, which met another at work on the run, and ended with nothing done."""
    ledger = Ledger(run)
    refused_at, newest, outcome = ledger.refused_at(number, 0), ledger.newest(), ledger.own_outcome(number, 0)
    if refused_at is None or newest is None or outcome is None or outcome.exit_code != RunDirError.exit_code:
        return False
    return refused_at <= ((_unix(newest.ended) if newest.ended else ledger.last_beat(newest)) or 0.0)


def _with_outlook(
    status: RunStatus, config: Config, logged: Logged, attempts: Sequence[Attempt], live: Queued | None
) -> RunStatus:
    step_s = logged.step_s([_unix(each.started) or 0.0 for each in attempts])
    if step_s is None or not attempts or status.state in ("ending", "finished", "diverged"):
        return status
    running = status.state in ("running", "starting")
    left_s = None
    if running:  # a job without a limit, or one of this machine, goes on to the end
        left_s = math.inf if status.left_s is None else status.left_s
    told = outlook.outlook(
        config.train.steps - status.step,
        step_s,
        left_s=left_s,
        limit_s=status.limit_s,
        start_up_s=_start_up_s(logged, attempts, live, step_s) or 0.0,
        margin_s=config.checkpoint.stop_margin_s,
    )
    return status if told is None else dataclasses.replace(status, eta_s=told.eta_s, jobs_needed=told.jobs)


def _start_up_s(logged: Logged, attempts: Sequence[Attempt], live: Queued | None, step_s: float) -> float | None:
    """Of the last attempt that took a step: from its job's start where Slurm tells that, else from when it was claimed."""
    for attempt in reversed(attempts):
        since = _unix(attempt.started)
        if live is not None and attempt is attempts[-1] and live.state == "RUNNING" and live.number == attempt.job:
            since = min(_unix(live.start) or since or 0.0, since or 0.0) or None
        if since and (seconds := logged.started_up_s(since, attempt.first_step, step_s)) is not None:
            return seconds
    return None


def _last_save(run: RunDir) -> tuple[int | None, float | None]:
    """Step and age in seconds of the furthest checkpoint."""
    for found in checkpoint.found(run.checkpoints)[:1]:
        with contextlib.suppress(OSError):
            return found.step, max(0.0, time.time() - (found.path / checkpoint.MANIFEST).stat().st_mtime)
    return None, None


def _unix(text: str) -> float | None:
    """Seconds since 1970 of a time in ISO form, which is local without a zone."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return None


def _config(run: RunDir) -> Config | None:
    with contextlib.suppress(ConfigError):
        return config_io.load(run.config)
    return None
