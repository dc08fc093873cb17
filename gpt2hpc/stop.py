"""`gpt2hpc stop`: a run saves and ends; a job of it that only waits is taken out of the queue, where nothing can be lost."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from gpt2hpc import cli
from gpt2hpc.cluster import foreground, orders, run_jobs
from gpt2hpc.cluster.ledger import Cause, Ledger
from gpt2hpc.errors import StoppedError
from gpt2hpc.reporting import run_status, runs
from gpt2hpc.reporting.run_state import WAITS, WORKS
from gpt2hpc.run_dir import RunDir

POLL_S, TELL_S = 0.5, 10.0
GOES_ON = (Cause.PREEMPTED, Cause.TIME_LIMIT)
"""Ends after which a job starts again, unless it has seen the wish to stop when that is decided."""


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(
        prog="gpt2hpc stop",
        description="Let a run save and end, without a requeue; a job of it that waits leaves the queue. `gpt2hpc resume` goes on.",
    )
    cli.add_examples(parser, "gpt2hpc stop runs/mine")
    runs.add_argument(parser)
    parser.add_argument("--no-wait", action="store_true", help="say it, and do not wait until it has happened")
    arguments = parser.parse_args(argv)
    asked = [run for run in runs.named(arguments.run) if ask_to_stop(run)]
    if arguments.no_wait:
        return 0
    try:
        for run in asked:
            _wait(run)
    except KeyboardInterrupt:
        cli.aside("gpt2hpc: no longer waiting; what was asked for happens all the same")
        return StoppedError.exit_code
    return 0


def ask_to_stop(run: RunDir) -> bool:
    """Ask it, and say what that means; whether there is something to wait for."""
    status = run_status.read_status(run, run_status.ask([run]))
    if status.state == "finished":
        cli.say(f"{run.path} is finished already, at step {status.step}")
        return False
    wished = run.stop.exists()
    run.stop.touch()  # first: a job that starts at this moment sees it
    left = _leave_the_queue(run)
    if status.state in WORKS or run_jobs.live(run) or foreground.find(run):
        cli.say(f"{run.path} is asked to save and end: {status.detail}")
        return True
    if left or not wished:
        run.stop.unlink(missing_ok=True)  # it would stop the next start
    if left:
        run_jobs.note_end(run, left[-1], action="stopped", reason="taken out of the queue by `gpt2hpc stop`")
        goes_on = f"nothing is lost, and `gpt2hpc resume {run.quoted}` goes on"
        cli.say(
            f"{run.path} did not run; job {', '.join(left)} is out of the queue: {goes_on} at step {status.checkpoint_step or 0}"
        )
    else:
        cli.say(f"{run.path} does not run: {status.state}" + (f", {status.detail}" if status.detail else ""))
    return False


def _leave_the_queue(run: RunDir) -> list[str]:
    """Cancel those of its jobs that wait; their numbers, but for those that have started meanwhile."""
    waiting = [row for row in run_jobs.live(run) if row.is_waiting]
    held = [row.number for row in waiting if row.is_held]  # no job starts out of that by itself
    for numbers, if_pending in ((held, False), ([row.number for row in waiting if not row.is_held], True)):
        if numbers:
            orders.cancel(numbers, if_pending=if_pending)
    there = {row.number for row in run_jobs.live(run)} if waiting else set()
    return [row.number for row in waiting if row.number not in there]


def _wait(run: RunDir) -> None:
    """Until its attempt has ended, with a line now and then."""
    began = told = time.monotonic()
    inquiry = run_status.Inquiry()
    while True:
        inquiry.renew([run])
        newest, status = Ledger(run).newest(), run_status.read_status(run, inquiry.answers)
        is_over = status.state == "ending" and newest is not None and newest.cause not in (None, *GOES_ON)
        if is_over or status.state not in WORKS:
            break
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            cli.say(f"{run.path}: {status.state} still, at step {status.step}, asked {cli.duration(told - began)} ago")
        time.sleep(POLL_S)
    if status.state in WAITS:  # preempted at that very moment
        ask_to_stop(run)
        return
    decision = Ledger(run).decision()
    if status.state in GOES_ON and decision is not None and decision.goes_on:  # no Slurm is seen
        cli.say(f"{run.path}: {decision.reason}; its job goes on by itself, and its next start saves and ends")
        return
    saved = f"step {newest.saved_step} is saved" if newest and newest.saved_step else "nothing was saved"
    met = decision.action if decision and decision.action in ("stopped", "cancelled") else None  # between two attempts
    how = met or (newest.cause if newest and newest.cause else status.state)
    goes_on = "" if how == "finished" else f"; `gpt2hpc resume {run.quoted}` goes on"
    cli.say(f"{run.path}: {how}, {saved}{goes_on}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
