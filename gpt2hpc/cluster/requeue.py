"""What to do when an attempt has ended: the one decision, made by a pure function, for every kind of cluster.

As a command it reads `scontrol show job -o` from standard input and prints one line for the batch shell to act on, ACTION CODE
DELAY_S ALLOW EXCLUDE REASON:

    scontrol show job -o "$SLURM_JOB_ID" | python -m gpt2hpc.cluster.requeue decide RUN_DIR --exit-code $rc

    requeue 6 0 0 - preempted at step 120
    resubmit 6 20 0 n7 crash 2 of 3 allowed (exit code 137)
    exit 7 0 0 - crashed 4 times without progress, …

CODE is what the script exits with. ALLOW 1 asks for `scontrol update Requeue=1` first; EXCLUDE is the new ExcNodeList, to be set
right after the requeue, or `-`; DELAY_S is for StartTime then, so that nobody holds nodes while waiting. Where the requeue is refused
all the same, the shell asks again with --refused and is told to submit a successor.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2hpc import cli, config_io
from gpt2hpc.cluster import foreground
from gpt2hpc.cluster.ledger import Attempt, Cause, Decision, Ledger, Outcome, outcome_of
from gpt2hpc.cluster.slurm import Job, expand_nodes, parse_show_job
from gpt2hpc.config import Config, RequeueConfig
from gpt2hpc.errors import (
    INTERNAL_ERROR,
    USER_ERRORS,
    CrashBudgetError,
    DivergedError,
    NodeError,
    RunDirError,
    StoppedError,
)
from gpt2hpc.run_dir import RunDir

MAX_BACKOFF_S = 600.0
TOLD_TO_END = "told to end by a signal; run the same command again to go on"


@dataclass(frozen=True)
class Action:
    """`requeue` (or `resubmit`, where that was refused) after `delay_s`, or `exit` with `exit_code`; `start` is a guard's (guard.py).

    `exclude_nodes` is the whole list of nodes to keep away from, the user's own included; empty to leave it as it is.
    `exit_code` is the batch script's; a job that goes on has not finished, so nothing may start after it as if it had.
    `cancelled`: somebody outside ended the job, and it stays away.
    """

    kind: Literal["exit", "requeue", "resubmit", "start"]
    reason: str
    exit_code: int = 0
    delay_s: float = 0.0
    exclude_nodes: str = ""
    cancelled: bool = False

    def line(self, *, allow: bool = False) -> str:
        """For the batch shell."""
        exclude, reason = self.exclude_nodes or "-", " ".join(self.reason.split())
        return f"{self.kind} {self.exit_code} {self.delay_s:.0f} {int(allow)} {exclude} {reason}"


@dataclass(frozen=True)
class Crash:
    """Where an attempt crashed: all its nodes, the one whose rank ended first, and those that it found wanting."""

    nodes: str
    died_on: str = ""
    suspects: tuple[str, ...] = ()


def decide(
    job: Job, outcome: Outcome | None, attempts: Sequence[Attempt], limits: RequeueConfig, *, finished: bool
) -> Action:
    """The action after an attempt of `job`; the first row that matches wins.

    An outcome of another attempt is ignored: this attempt then ended without a word, which is a crash.
    """
    mine = outcome_of(job.job, job.restart, outcome, attempts)
    if (finished and _has_ended_well(job, attempts)) or (mine and mine.cause == Cause.FINISHED):
        return Action("exit", "finished")
    if mine and mine.cause == Cause.DIVERGED:
        return Action(
            "exit", f"diverged at step {mine.step}; the last good checkpoint is kept", DivergedError.exit_code
        )
    if mine and mine.cause == Cause.STOPPED:
        return Action("exit", f"stopped by the user at step {mine.step}", StoppedError.exit_code)
    if mine and mine.cause == Cause.ERROR:
        return Action("exit", mine.message, mine.exit_code or INTERNAL_ERROR)
    if job.cancelled or job.state != "RUNNING" or job.restarts != job.restart:
        return Action("exit", _not_ours(job), StoppedError.exit_code, cancelled=job.restarts == job.restart)
    if not mine and job.exit_code in _unmendable():
        return Action("exit", "an error that a restart cannot mend; see above", job.exit_code or INTERNAL_ERROR)
    again = _again(job)
    crashed, fruitless = _since_progress(job, attempts)
    crashes = len(crashed)
    if fruitless > limits.max_without_progress:
        return Action(
            "exit",
            f"{fruitless} attempts in a row saved nothing new; mend what stops them, then submit again "
            f"(requeue.max_without_progress={limits.max_without_progress})",
            CrashBudgetError.exit_code,
        )
    if mine and mine.cause in (Cause.PREEMPTED, Cause.TIME_LIMIT):
        return Action(again, f"{mine.cause} at step {mine.step}", StoppedError.exit_code)
    if not mine and _signalled(job):
        return Action(again, "signalled before it could save", StoppedError.exit_code)
    if crashes > limits.crash_budget:
        return Action(
            "exit",
            f"crashed {crashes} times without progress, last after step {_last_saved(attempts)}; look at the logs, mend it, then "
            f"submit again (requeue.crash_budget={limits.crash_budget})",
            CrashBudgetError.exit_code,
        )
    delay_s = min(limits.backoff_s * 2 ** (crashes - 1), MAX_BACKOFF_S) if limits.backoff_s else 0.0
    how = "ended without a word" if job.exit_code is None else f"exit code {job.exit_code}"
    reason = f"crash {crashes} of {limits.crash_budget} allowed ({how})"
    return Action(again, reason, StoppedError.exit_code, delay_s=delay_s, exclude_nodes=_excluded(job, crashed))


def _signalled(job: Job) -> bool:
    """Whether a preemption, or the warning of a time limit, met ranks that did not listen yet."""
    return job.preempted or job.exit_code in (128 + signal.SIGUSR1, 128 + signal.SIGUSR2)


def _again(job: Job) -> Literal["requeue", "resubmit"]:
    return "resubmit" if job.refused else "requeue"


def _excluded(job: Job, crashed: Sequence[Crash]) -> str:
    """The bad nodes, merged with those excluded already: what the last attempt found wanting; the node whose rank was twice the first
    to end, in crashes in a row; or else the one node that these crashes have in common."""
    bad = set(crashed[0].suspects)
    died_on = [crash.died_on for crash in crashed if crash.died_on]
    bad |= {node for node in died_on if died_on.count(node) > 1}
    if not bad and len(crashed) > 1:
        common = set.intersection(*(set(expand_nodes(crash.nodes)) for crash in crashed))
        bad = common if len(common) == 1 else set()
    known = expand_nodes(job.excluded)
    new = sorted(bad - {*known, *expand_nodes(job.required)})
    return ",".join([*known, *new]) if new else ""


def _unmendable() -> set[int]:
    """Exit codes of errors that a restart cannot mend."""
    return {error.exit_code for error in USER_ERRORS} - {StoppedError.exit_code}


def _since_progress(job: Job, attempts: Sequence[Attempt]) -> tuple[list[Crash], int]:
    """Each crash, the newest first, and how many restarts saved nothing, since the last one that did (its own crash counts).

    Only this job's count, and those of the jobs that it continues: a new submission gets a new budget. An earlier start that
    nobody has seen the end of was ended from outside, with its node, and is no crash.
    """
    crashed: list[Crash] = []
    fruitless = 0
    for name, restart, attempt in _starts(job, attempts):
        now = (name, restart) == (job.job, job.restart)
        unseen = attempt is None or attempt.cause is None
        if (unseen and now and not _signalled(job)) or (attempt is not None and attempt.cause == Cause.CRASHED):
            crashed.append(_crash(job, attempt, died_on=job.died_on if now else ""))
        fruitless += attempt is None or not attempt.progressed
        if attempt is not None and attempt.progressed:
            break
    return crashed, fruitless


def _crash(job: Job, attempt: Attempt | None, *, died_on: str) -> Crash:
    if attempt is None:
        return Crash(job.nodes, died_on)
    codes = (attempt.exit_code, job.exit_code if attempt.cause is None else None)
    if attempt.suspects or NodeError.exit_code in codes:  # the healthy ranks ended, and one of them first
        return Crash(attempt.nodes, "", attempt.suspects)
    return Crash(attempt.nodes, attempt.died_on or died_on)


def _starts(job: Job, attempts: Sequence[Attempt]) -> Iterator[tuple[str, int, Attempt | None]]:
    """Every start of this job and of those that it continues, the newest first; None for one that the ledger does not know."""
    for name in (job.job, *job.succeeds):
        known = {attempt.restart: attempt for attempt in attempts if attempt.job == name}
        last = job.restart if name == job.job else max(known, default=-1)
        for restart in range(last, -1, -1):
            yield name, restart, known.get(restart)


def _has_ended_well(job: Job, attempts: Sequence[Attempt]) -> bool:
    """Whether a finished run is this job's doing, or what it found; a later start that failed is neither."""
    newest = attempts[-1] if attempts else None
    mine = newest is not None and (newest.job, newest.restart) == (job.job, job.restart)
    return job.exit_code in (0, None) or (mine and newest is not None and newest.cause == Cause.FINISHED)


def _last_saved(attempts: Sequence[Attempt]) -> int:
    return max((max(attempt.saved_step, attempt.first_step) for attempt in attempts), default=0)


def _not_ours(job: Job) -> str:
    if job.cancelled:
        return TOLD_TO_END
    if job.restarts != job.restart:
        return "requeued by somebody else already"
    return f"cancelled, or ended from outside (the job is {job.state})"


def read_and_decide(run: RunDir, job: Job, *, by: str = "") -> Action:
    """`decide` with what the run directory holds; the decision, and a crash that nobody else has seen, are written there.

    `by` is the guard that does it for the job.
    """
    ledger = Ledger(run)
    config = config_io.load(run.config) if run.config.exists() else Config()
    finished = ledger.is_finished(config.train.steps)
    mine = ledger.own_outcome(job.job, job.restart)
    ours = not job.cancelled and job.state == "RUNNING" and job.restarts == job.restart
    if mine and ours and mine.cause in (Cause.PREEMPTED, Cause.TIME_LIMIT) and run.stop.exists():
        mine = _stopped(ledger, mine)
    user_error = job.exit_code in _unmendable()
    if mine is None and ours and not user_error and not (finished and _has_ended_well(job, ledger.attempts())):
        cause = Cause.PREEMPTED if _signalled(job) else Cause.CRASHED
        ledger.close_for(job.job, job.restart, job.nodes, cause, job.exit_code, died_on=job.died_on)
    action = decide(job, mine, [*ledger.unclaimed(), *ledger.attempts()], config.requeue, finished=finished)
    ledger.remember(Decision(job.job, job.restart, "cancelled" if action.cancelled else action.kind, action.reason, by))
    return action


def _stopped(ledger: Ledger, outcome: Outcome) -> Outcome:
    """The outcome of an attempt that was saving already when the user wished to stop: what is saved is what that would have saved.

    It is noted, so that the wish is an old one to a later submission.
    """
    stopped = dataclasses.replace(outcome, cause=Cause.STOPPED)
    newest = ledger.newest()
    if newest is not None:
        with contextlib.suppress(OSError):  # a full disk must not keep the job from ending
            ledger.close(newest, stopped)
    return stopped


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpt2hpc.cluster.requeue", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("decide", help="read `scontrol show job -o` from standard input, print one action")
    command.add_argument("run_dir", type=Path)
    command.add_argument("--exit-code", type=int, help="what srun returned")
    command.add_argument("--restart", type=int, help="how often the job was restarted (default: $SLURM_RESTART_COUNT)")
    command.add_argument("--succeeds", default="", help="jobs that this one continues, the newest first: 12,10")
    command.add_argument("--refused", action="store_true", help="`scontrol requeue` was tried and refused")
    command.add_argument("--died-on", default="", metavar="NODE", help="whose rank ended first")
    asked = commands.add_parser("may-start", help="fail, with exit code 9, where another job is at work on the run")
    asked.add_argument("run_dir", type=Path)
    asked.add_argument("--job", required=True, help="the one that would start")
    arguments = parser.parse_args(argv)
    if not arguments.run_dir.is_dir():
        raise RunDirError(f"{arguments.run_dir} is not a run directory; check the path")
    if arguments.command == "may-start":
        foreground.refuse_another(RunDir(arguments.run_dir), arguments.job)
        return 0
    restart = arguments.restart
    job = parse_show_job(
        sys.stdin.read(),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0) if restart is None else restart,
        exit_code=arguments.exit_code,
        refused=arguments.refused,
        succeeds=[each for each in arguments.succeeds.split(",") if each],
        died_on=arguments.died_on,
    )
    action = read_and_decide(RunDir(arguments.run_dir), job)
    cli.say(action.line(allow=action.kind == "requeue" and not job.may_requeue))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
