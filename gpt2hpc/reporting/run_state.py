"""In what state a run is, why, and what to do about it: a judgement on its ledger and on Slurm's word of its job."""

from __future__ import annotations

import pwd
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from gpt2hpc import cli
from gpt2hpc.cluster import foreground, queries, reasons, run_jobs
from gpt2hpc.cluster.dist_env import LOCAL
from gpt2hpc.cluster.foreground import Supervisor
from gpt2hpc.cluster.ledger import Attempt, Cause, Decision, Ledger, Outcome
from gpt2hpc.cluster.queries import Accounted, Queued
from gpt2hpc.run_dir import RunDir

RESUME = "gpt2hpc resume RUN"
AGAIN = "the command that submitted it, again"
WAITS, WORKS = ("pending", "held"), ("starting", "running", "ending", "suspended")
"""Words of states: its job is in the queue, or has nodes."""


@dataclass(frozen=True)
class State:
    """`word` for a table, `detail` in a sentence, `next` the command that helps, where RUN stands for the run directory."""

    word: str
    detail: str = ""
    next: str | None = None


def judge(
    run: RunDir,
    ledger: Ledger,
    attempts: Sequence[Attempt],
    steps: int | None,
    job: Queued | None,
    accounts: Mapping[str, Accounted],
) -> State:
    """The state of a run; `job` is the one that works on it, waits to, or was the last to."""
    if ledger.is_finished(steps or 0):
        return State("finished")
    if job is not None and job.is_live:
        return _waiting(job, ledger.decision()) if job.is_waiting else _working(job, ledger, attempts)
    newest = attempts[-1] if attempts else None
    if newest is not None and ledger.seems_alive(newest):
        return _running(newest)
    if (supervisor := foreground.find(run)) is not None:
        return _between_attempts(supervisor, newest, ledger.decision())
    over = _over(job, newest, accounts)
    again = RESUME if run.resume_script.exists() or (newest and newest.job.startswith(LOCAL)) else AGAIN
    if newest is not None and over is not None and job is not None and _is_later(job, newest):
        saved = max(max(attempt.first_step, attempt.saved_step) for attempt in attempts)
        return State("crashed", f"{over.detail}, before an attempt began; it would resume at step {saved}", again)
    return _ended(run, newest, attempts, over, again)


def _is_later(job: Queued, newest: Attempt) -> bool:
    """Whether it came after the last attempt, and failed without making one of its own."""
    after = newest.job.startswith(LOCAL) or run_jobs.order(job.number) > run_jobs.order(newest.job)
    return after and job.state not in ("COMPLETED", "CANCELLED")


def _waiting(job: Queued, decision: Decision | None) -> State:
    told = f"job {job.number} waits: {reasons.waits(job.reason)}"
    if decision and decision.goes_on:
        told = f"{decision.reason}; {told}"
    if job.is_held and not reasons.is_held(job.reason):
        return State("held", f"{told}; held ({job.state})", f"scontrol release {job.number}")
    if job.is_held:
        return State("held", told, reasons.mend(job.reason, job.number) or None)
    return State("pending", told, reasons.mend(job.reason, job.number) or None)


def _working(job: Queued, ledger: Ledger, attempts: Sequence[Attempt]) -> State:
    newest = attempts[-1] if attempts else None
    on = f"job {job.number} on {job.nodes}" if job.nodes else f"job {job.number}"
    if job.state in ("SUSPENDED", "STOPPED"):
        return State("suspended", on)
    is_ending = job.state in ("COMPLETING", "STAGE_OUT")
    if newest is None or newest.job != job.number or _began_before(newest, job):
        return State("ending" if is_ending else "starting", on)
    if newest.cause is not None or is_ending:
        decision = ledger.decision()
        return State("ending", f"{on}: {decision.reason if decision else newest.cause or job.state.lower()}")
    if ledger.seems_alive(newest):
        return _running(newest)
    return State("running", f"{on}, but its rank 0 on {newest.host} gives no sign of life")


def _began_before(attempt: Attempt, job: Queued) -> bool:
    """Whether the attempt is of an earlier start of the job than the one that runs now."""
    try:
        return datetime.fromisoformat(attempt.started).timestamp() < datetime.fromisoformat(job.start).timestamp() - 2
    except ValueError:
        return False


def _running(attempt: Attempt) -> State:
    ranks = cli.plural(attempt.world_size, "rank")
    return State(
        "running", f"job {attempt.job} on {attempt.nodes or attempt.host}, pid {attempt.pid} on {attempt.host}, {ranks}"
    )


def _between_attempts(supervisor: Supervisor, newest: Attempt | None, decision: Decision | None) -> State:
    """Of a local run without a rank: it begins, pauses after a crash, or comes to its end."""
    on = f"job {supervisor.job}, pid {supervisor.pid} on {supervisor.host}"
    if newest is None or newest.job != supervisor.job:
        return State("starting", on)
    if decision is not None and decision.action == "requeue":
        return State("starting", f"{on}, starts again: {decision.reason}")
    return State("ending", f"{on}: {decision.reason if decision else newest.cause or 'its ranks have ended'}")


def _ended(run: RunDir, newest: Attempt | None, attempts: Sequence[Attempt], over: State | None, again: str) -> State:
    ledger = Ledger(run)
    decision = ledger.decision()
    gave_up = decision.reason if decision and not decision.goes_on else ""
    if newest is None:
        detail = gave_up or (over.detail if over else "no attempt yet")
        return State("new", detail, again if gave_up or over else None)
    if newest.cause == Cause.FINISHED:
        return State("extended", f"was finished at step {newest.last_step}, and is to go further", again)
    if decision and decision.action in ("cancelled", "stopped"):
        return State(decision.action, gave_up, again)
    saved = max(max(attempt.first_step, attempt.saved_step) for attempt in attempts)
    if newest.cause is None:
        how = over.detail if over else f"job {newest.job} on {newest.host} ended without a word"
        return State(over.word if over else "crashed", f"{how}; it would resume at step {saved}", again)
    was_to_go_on = newest.cause in (Cause.PREEMPTED, Cause.TIME_LIMIT)
    if over is not None and decision is None and was_to_go_on:  # nobody requeued it
        return State(
            over.word, f"{newest.cause} at step {newest.last_step}; then {over.detail}; it would resume there", again
        )
    if gave_up or decision is None:
        return State(newest.cause, gave_up or _explained(newest, ledger.outcome()), again)
    if over is not None:  # it was to go on, and something outside has ended that
        return State(over.word, f"{decision.reason}; then {over.detail}", again)
    return State(newest.cause, _queued(run, decision) or _explained(newest, ledger.outcome()), again)


def _over(job: Queued | None, newest: Attempt | None, accounts: Mapping[str, Accounted]) -> State | None:
    """How Slurm says that the run's last job ended; None where it tells nothing, or where the script itself ended it."""
    number = job.number if job else newest.job if newest else None
    account = accounts.get(number or "")
    state = account.state if account else job.state if job else ""
    if state not in queries.OVER:
        return None
    told = reasons.ended(
        state,
        reason=job.reason if job else "",
        exit_code=account.exit_code if account else "",
        by=_user(account.by) if account else "",
    )
    words = {"CANCELLED": "cancelled", "TIMEOUT": str(Cause.TIME_LIMIT), "PREEMPTED": str(Cause.PREEMPTED)}
    nodes = (account.nodes if account else job.nodes if job else "") or ""
    where = f" on {nodes}" if nodes and not nodes.startswith("None") else ""
    return State(words.get(state, "crashed"), f"job {number}{where} ended: {told}")


def _user(number: str) -> str:
    """The name of a user."""
    try:
        return pwd.getpwuid(int(number)).pw_name
    except (ValueError, KeyError):
        return number


def _queued(run: RunDir, decision: Decision) -> str:
    """Of a batch job that has requeued itself, where Slurm is not seen; a local one is seen running, or ended with its terminal."""
    if decision.job.startswith(LOCAL):
        return ""
    how = "requeued itself"
    if decision.action == "resubmit":
        number = run_jobs.successor(run, decision.job)
        how = (
            f"was submitted again as job {number}"
            if number
            else "was to be submitted again, as a job that is not known"
        )
    return f"{decision.reason}; job {decision.job} {how}"


def _explained(attempt: Attempt, outcome: Outcome | None) -> str:
    if outcome and outcome.message:
        return outcome.message
    step = max(attempt.first_step, attempt.saved_step) if attempt.last_step is None else attempt.last_step
    how = "crashed" if attempt.cause == Cause.CRASHED else "ended"
    return f"attempt {attempt.number} (job {attempt.job}) {how}{_killed(attempt.exit_code)}; it would resume at step {step}"


def _killed(exit_code: int | None) -> str:
    """Of a rank's exit code, by which signal, if one has ended it."""
    if exit_code == 128 + signal.SIGKILL:
        return ", killed by SIGKILL: out of memory?"
    if exit_code is None or exit_code - 128 not in set(signal.Signals):
        return ""
    return f", killed by {signal.Signals(exit_code - 128).name}"
