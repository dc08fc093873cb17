"""The ledger of a run: which attempts there were, how they ended, and which one may write.

`attempts/0001.json`, `0002.json`, … An attempt exists by creating the file after the newest one, which only one
process anywhere can do (a hard link; no lock, since flock is a no-op on Lustre and GPFS). So the fence is one look: an
attempt whose successor's file exists may publish, prune and log nothing more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.cluster import liveness
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.errors import Gpt2hpcError, RunDirError
from gpt2hpc.run_dir import RunDir


class Cause(enum.StrEnum):
    """Why an attempt ended. One that was ended from outside (killed with its node, say) has no cause."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    ERROR = "error"
    CRASHED = "crashed"
    """Written by whoever saw the end, not by the attempt itself."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run: `first_step` resumed from, `saved_step` last checkpoint, `last_step` when it ended.

    `repeats` counts the steps after `first_step` that earlier attempts had logged already, work that was lost; None where unknown.
    `suspects` are nodes that it found wanting, `died_on` is the one whose rank ended first in a crash.
    `process` tells the process from any other: machine, PID namespace and start time.
    `start_up` has the seconds of each phase from rank 0's process to the end of the first step; empty where that was not reached.
    `compile_cache` is cold, warm or partly warm; None where nothing was compiled.
    """

    number: int
    job: str
    restart: int
    host: str
    pid: int
    started: str
    process: str
    nodes: str
    world_size: int
    first_step: int = 0
    saved_step: int = 0
    last_step: int | None = None
    cause: str | None = None
    exit_code: int | None = None
    ended: str | None = None
    repeats: int | None = None
    suspects: tuple[str, ...] = ()
    died_on: str = ""
    start_up: Mapping[str, float] = dataclasses.field(default_factory=dict)
    compile_cache: str | None = None

    @property
    def start_up_s(self) -> float | None:
        return sum(self.start_up.values()) if self.start_up else None

    @property
    def cause_words(self) -> str:
        return (self.cause or "ended without a word").replace("_", " ")

    @property
    def progressed(self) -> bool:
        return self.saved_step > self.first_step or self.cause == Cause.FINISHED


@dataclass(frozen=True)
class Outcome:
    """`outcome.json`: how the attempt of that number ended; `exit_code` only with the cause `error`.

    Number 0: the job failed before it could claim an attempt.
    """

    attempt: int
    job: str
    restart: int
    cause: Cause
    step: int
    exit_code: int | None = None
    message: str = ""


@dataclass(frozen=True)
class Decision:
    """`decision.json`: what was decided when that restart of that job had ended, and why.

    `action` is an `Action`'s kind, or `cancelled` or `stopped` where somebody outside has ended the job. `by` is the guard that decided
    in its place; empty where the job did itself.
    """

    job: str
    restart: int
    action: str
    reason: str
    by: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether the run starts again by itself, as the same job or as another."""
        return self.action in ("requeue", "resubmit")


class Fenced(RunDirError):
    """A newer attempt took over; this one must not write."""


class Ledger:
    def __init__(self, run: RunDir) -> None:
        self._run = run

    def attempts(self) -> list[Attempt]:
        """All attempts in their order."""
        return list(filter(None, map(self._read, self._numbers())))

    def claim(self, env: DistEnv) -> Attempt:
        """Become the run's newest attempt; RunDirError while another one lives.

        The restart of a job supersedes its earlier attempts without asking: Slurm ended them, or thinks so.
        """
        # The number first: whoever claims after this is met by the refusal, or by our own claim, which then fails.
        number = max(self._numbers(), default=0)
        newest = self.newest()
        self._refuse_if_taken(env.job, env.restart, newest)
        attempt = Attempt(
            number=number + 1,
            job=env.job,
            restart=env.restart,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=utc_now(),
            process=liveness.process_identity(os.getpid()),
            nodes=env.nodes,
            world_size=env.world_size,
        )
        if not durable.create_text(self._run.attempt(attempt.number), durable.to_json(dataclasses.asdict(attempt))):
            raise RunDirError(
                f"--run-dir={self._run.path} was taken by another start a moment ago; choose another --run-dir"
            )
        self._run.refusal(env.job, env.restart).unlink(missing_ok=True)  # of an earlier start by the same name
        return attempt

    def refuse_if_taken(self, job: str, restart: int) -> None:
        """Raise RunDirError if an attempt lives that this restart of this job would not supersede."""
        self._refuse_if_taken(job, restart, self.newest())

    def _refuse_if_taken(self, job: str, restart: int, newest: Attempt | None) -> None:
        supersedes = newest is not None and job == newest.job and restart > newest.restart
        if newest and not supersedes and self.alive(newest):
            raise RunDirError(
                f"--run-dir={self._run.path} is in use by attempt {newest.number} (job {newest.job}, pid {newest.pid} on "
                f"{newest.host}); wait for it, stop it with `touch {self._run.stop}`, or choose another --run-dir"
            )

    def superseded(self, attempt: Attempt) -> bool:
        return self._run.attempt(attempt.number + 1).exists()

    def fence(self, attempt: Attempt) -> None:
        """Raise Fenced if a newer attempt exists: to be called before anything is published."""
        if self.superseded(attempt):
            raise Fenced(
                f"attempt {attempt.number} of {self._run.path} was superseded by a newer one and writes nothing more"
            )

    def update(self, attempt: Attempt) -> None:
        """Replace the attempt's record by a newer state of it."""
        self.fence(attempt)
        durable.publish_json(self._run.attempt(attempt.number), dataclasses.asdict(attempt))

    def note(self, attempt: Attempt, **facts: Any) -> None:
        """Change some facts of the attempt's record, and leave the others as they are."""
        self.update(dataclasses.replace(self._read(attempt.number) or attempt, **facts))

    def close(self, attempt: Attempt, outcome: Outcome) -> None:
        """Write the outcome, then the attempt's end."""
        self.fence(attempt)
        durable.publish_json(self._run.outcome, dataclasses.asdict(outcome))
        end = {"last_step": outcome.step, "exit_code": outcome.exit_code, "ended": utc_now()}
        self.note(attempt, cause=str(outcome.cause), **end)

    def outcome(self) -> Outcome | None:
        """The last one written; None where there is none, or what there is cannot be read."""
        return _outcome_in(self._run.outcome)

    def finished_step(self) -> int | None:
        """The step that FINISHED names, if the run got there."""
        with contextlib.suppress(TypeError, KeyError, ValueError):
            return int((durable.read_json(self._run.finished) or {})["step"])
        return None

    def is_finished(self, steps: int) -> bool:
        """Whether the run got to its last step; a longer run than the one that finished is not."""
        done = self.finished_step()
        return done is not None and done >= steps

    def own_outcome(self, job: str, restart: int) -> Outcome | None:
        """The outcome, if it is of the newest attempt and that is this job's restart; or why it did not become one."""
        refusal = _outcome_in(self._run.refusal(job, restart))
        return refusal or outcome_of(job, restart, self.outcome(), self.attempts())

    def refuse(self, job: str, restart: int, error: Gpt2hpcError) -> None:
        """Remember why a rank cannot even begin: the exit codes of the others, ended for it, may hide its own."""
        facts = dataclasses.asdict(Outcome(0, job, restart, Cause.ERROR, 0, error.exit_code, error.line))
        with contextlib.suppress(OSError):
            self._run.attempts.mkdir(parents=True, exist_ok=True)
            durable.create_text(self._run.refusal(job, restart), durable.to_json(facts))

    def refused_at(self, job: str, restart: int) -> float | None:
        """When that was, in seconds since 1970; None where nothing was refused."""
        return _changed_at(self._run.refusal(job, restart))

    def remember(self, decision: Decision) -> None:
        """Keep what was decided, for `gpt2hpc status`; not from a job that another has taken over from."""
        newest = self.newest()
        if newest is None or newest.job == decision.job:
            with contextlib.suppress(OSError):
                durable.publish_json(self._run.decision, dataclasses.asdict(decision))

    def decision(self) -> Decision | None:
        """The last one, if no attempt has begun since."""
        with contextlib.suppress(TypeError):
            facts, newest = durable.read_json(self._run.decision), self.newest()
            decision = Decision(**facts) if facts else None
            if decision and (newest is None or (newest.job == decision.job and newest.restart <= decision.restart)):
                return decision
        return None

    def close_for(
        self,
        job: str,
        restart: int,
        nodes: str,
        cause: Cause,
        exit_code: int | None,
        *,
        died_on: str = "",
        suspects: tuple[str, ...] = (),
    ) -> None:
        """Write the end of that restart for it, if it has left none: somebody saw its processes end.

        One that ended before it could claim an attempt gets number 0, and a file that fences nobody.
        """
        newest = self.newest()
        end = {"cause": str(cause), "exit_code": exit_code, "ended": utc_now(), "died_on": died_on}
        if newest and (newest.job, newest.restart) == (job, restart):
            if newest.cause is None:
                if newest.exit_code is not None:  # a hang's, by itself; that a rank was killed then tells less
                    end["exit_code"] = newest.exit_code
                self.update(dataclasses.replace(newest, **end))  # type: ignore[arg-type]
            return
        unclaimed = Attempt(0, job, restart, "", 0, utc_now(), "", nodes, 0, suspects=suspects, **end)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            self._run.attempts.mkdir(parents=True, exist_ok=True)
            durable.create_text(self._run.unclaimed(job, restart), durable.to_json(dataclasses.asdict(unclaimed)))

    def unclaimed(self) -> list[Attempt]:
        """Starts that ended before they could claim an attempt, as far as somebody saw it."""
        return list(filter(None, map(_attempt_in, sorted(self._run.attempts.glob("unclaimed-*.json")))))

    def newest(self) -> Attempt | None:
        """The last one whose file can be read."""
        return next(filter(None, map(self._read, reversed(self._numbers()))), None)

    def alive(self, attempt: Attempt) -> bool:
        """Whether the attempt runs still: by its process where that can be seen, elsewhere by 2.5 beats' watching."""
        if attempt.cause is not None:
            return False
        if liveness.is_here(attempt.process):
            return liveness.process_identity(attempt.pid) == attempt.process
        return liveness.is_beating(self._run.beat(attempt.number))

    def seems_alive(self, attempt: Attempt) -> bool:
        """The same at a glance, for a table: on another machine by the age of its heartbeat."""
        if attempt.cause is not None or liveness.is_here(attempt.process):
            return self.alive(attempt)
        beat = self.last_beat(attempt)
        return beat is not None and time.time() - beat < 6 * liveness.BEAT_S

    def last_beat(self, attempt: Attempt) -> float | None:
        """When it gave its last sign of life, in seconds since 1970; None where there is none."""
        return _changed_at(self._run.beat(attempt.number))

    @contextlib.contextmanager
    def heartbeat(self, attempt: Attempt, *, writes: bool) -> Iterator[None]:
        """Give signs of life in a thread, on the one rank that `writes`."""
        if not writes:
            yield
            return
        with liveness.heartbeat(self._run.beat(attempt.number)):
            yield

    def _numbers(self) -> list[int]:
        """Of the attempts' files, in their order, readable or not."""
        return sorted(int(path.stem) for path in self._run.attempts.glob("[0-9]*.json") if path.stem.isdecimal())

    def _read(self, number: int) -> Attempt | None:
        return _attempt_in(self._run.attempt(number))


def _attempt_in(path: Path) -> Attempt | None:
    with contextlib.suppress(TypeError):
        if facts := durable.read_json(path):
            return Attempt(**{**facts, "suspects": tuple(facts.get("suspects", ()))})
    return None


def _outcome_in(path: Path) -> Outcome | None:
    with contextlib.suppress(TypeError, KeyError, ValueError):
        if facts := durable.read_json(path):
            return Outcome(**{**facts, "cause": Cause(facts["cause"])})
    return None


def _changed_at(path: Path) -> float | None:
    """In seconds since 1970; None where there is no such file."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return None


def outcome_of(job: str, restart: int, outcome: Outcome | None, attempts: Sequence[Attempt]) -> Outcome | None:
    """The outcome of that restart of that job; one of any other attempt is None."""
    if outcome and (outcome.attempt, outcome.job, outcome.restart) == (0, job, restart):
        return outcome
    if outcome is None or not attempts:
        return None
    newest = attempts[-1]
    whose = (outcome.attempt, outcome.job, outcome.restart)
    return outcome if whose == (newest.number, newest.job, newest.restart) == (newest.number, job, restart) else None


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
