"""`gpt2hpc cancel`: a run ends at once, its jobs and those that wait to take over with it; what was saved stays."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence

from gpt2hpc import cli
from gpt2hpc.cluster import foreground, liveness, orders, queries, run_jobs, unstarted
from gpt2hpc.cluster.dist_env import LOCAL
from gpt2hpc.cluster.foreground import Supervisor
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.cluster.queries import Queued
from gpt2hpc.errors import MissingError, RunDirError
from gpt2hpc.reporting import run_status, runs
from gpt2hpc.run_dir import RunDir

RESUBMIT_S, POLL_S, TRIES = 10.0, 0.5, 30
"""How long a job that was cancelled while it submitted another one, or requeued itself, is waited for, and how often Slurm is asked
at most."""


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(
        prog="gpt2hpc cancel",
        description="End a run: scancel its jobs, also those that wait or come after it, or TERM to a local job, which saves first. "
        "`gpt2hpc stop` lets any job save first.",
    )
    cli.add_examples(parser, "gpt2hpc cancel runs/mine")
    runs.add_argument(parser)
    arguments = parser.parse_args(argv)
    found = runs.named(arguments.run)
    for run in found:
        _cancel(run)
    if arguments.run is not None and not runs.is_run(arguments.run):
        _cancel_unstarted(found)
    return 0


def _cancel_unstarted(tasks: Sequence[RunDir]) -> None:
    """Tasks of the same array that have no run directory yet."""
    known = {number for run in tasks for number in run_jobs.numbers(run)}
    rest = [number for number in queries.queue(known) or {} if "_" in number and number not in known]
    if rest:
        orders.cancel(rest)
        cli.say(f"and {cli.plural(len(rest), 'task')} that had not begun: {', '.join(rest)}")


def _cancel(run: RunDir) -> None:
    if (supervisor := foreground.find(run)) is not None:
        _tell_to_end(run, supervisor)
        return
    newest = Ledger(run).newest()
    if newest is not None and newest.job.startswith(LOCAL) and Ledger(run).seems_alive(newest):
        # Torchrun's, say, which nothing of ours starts again: rank 0 is told, and tells the others.
        _tell_to_end(run, Supervisor(newest.job, newest.host, newest.pid, newest.process, newest.world_size))
        return
    if rest := [row.number for row in run_jobs.live_after(run)]:
        orders.cancel(rest)
        cli.say(f"{run.path}: what waits for it or comes after it is cancelled: {', '.join(rest)}")
    jobs = _cancel_jobs(run)
    if not jobs and rest:
        return
    if not jobs:
        status = run_status.read_status(run)
        if status.state == "running":
            raise MissingError(
                f"{run.path} runs ({status.detail}), but Slurm is not seen from here; use a login node of that cluster"
            )
        told = f", {status.detail}" if status.detail else ""
        cli.say(f"{run.path} has no job in the queue: {status.state}{told}{unstarted.hint()}")
        return
    status = run_status.read_status(run)
    if status.state != "finished":
        run_jobs.note_end(run, jobs[-1], action="cancelled", reason="cancelled with `gpt2hpc cancel`")
    saved = f"step {status.checkpoint_step} is saved" if status.checkpoint_step else "nothing was saved"
    cli.say(f"{run.path}: job {', '.join(jobs)} cancelled; {saved}, `gpt2hpc resume {run.quoted}` goes on")


def _cancel_jobs(run: RunDir) -> list[str]:
    """Cancel its jobs, those included that one of them was just submitting to go on as, or has requeued itself as; their numbers."""
    cancelled: list[str] = []
    until = time.monotonic() + RESUBMIT_S
    for _ in range(TRIES):
        live = run_jobs.live(run)
        rows = [row for row in live if row.number not in cancelled or row.is_waiting]
        if rows:
            orders.cancel([row.number for row in rows])
            cancelled += [row.number for row in rows if row.number not in cancelled]
        elif not (cancelled and _may_go_on(run, cancelled, live) and time.monotonic() < until):
            break
        time.sleep(POLL_S)
    return cancelled


def _may_go_on(run: RunDir, cancelled: Sequence[str], live: Sequence[Queued]) -> bool:
    """Whether one of them was about to go on: as another job, of which nobody knows yet, or requeued, which shows only at its end."""
    decision = Ledger(run).decision()  # none once it has begun again
    if decision is None or decision.job not in cancelled:
        return False
    if decision.action == "requeue":
        return any(row.number == decision.job for row in live)
    return decision.action == "resubmit" and run_jobs.successor(run, decision.job) is None


def _tell_to_end(run: RunDir, supervisor: Supervisor) -> None:
    """TERM to what starts the ranks, which tells them to save and starts them no more."""
    if not liveness.is_here(supervisor.process):
        raise RunDirError(
            f"{run.path} runs on {supervisor.host} as pid {supervisor.pid}, which cannot be signalled from here; call this there, or "
            f"`gpt2hpc stop {run.quoted}` from anywhere"
        )
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(supervisor.pid, signal.SIGTERM)
    ranks = cli.plural(supervisor.nproc, "rank")
    cli.say(f"{run.path}: TERM was sent to pid {supervisor.pid}; its {ranks} save and end")


if __name__ == "__main__":
    sys.exit(cli.run(main))
