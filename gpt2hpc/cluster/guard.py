"""Whether a guard takes over: a job that has waited for another one of its run to fail where that one could not decide itself.

    { scontrol show job -o "$failed"; scontrol show job -o "$SLURM_JOB_ID"; } |
        python -m gpt2hpc.cluster.guard RUN_DIR --job "$failed" --by "$SLURM_JOB_ID"

prints a line as `gpt2hpc.cluster.requeue` does. `start`: the guard goes on with the run, and whoever comes after it keeps away from
EXCLUDE. `requeue`: it has been given nodes out of EXCLUDE, and should come back without them; where EXCLUDE is `-` it goes on, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli
from gpt2hpc.cluster import queries
from gpt2hpc.cluster.ledger import Decision, Ledger
from gpt2hpc.cluster.requeue import Action, read_and_decide
from gpt2hpc.cluster.slurm import Job, expand_nodes, parse_show_job
from gpt2hpc.errors import RunDirError, StoppedError
from gpt2hpc.run_dir import RunDir

GIVES_BACK = 3
"""How many starts of a guard may end with its nodes given back, where Slurm gives it bad ones again and again."""


def take_over(
    run: RunDir, text: str, *, job: str, by: str, succeeds: Sequence[str] = (), own: Job | None = None
) -> Action:
    """Whether the job `by` goes on with the run in place of `job`: `start`, `requeue` for other nodes first, or `exit`.

    `text` is `scontrol show job` of `job`, and `own` what is known so of the guard.

    As if `job` itself had come to its end and decided. What somebody has cancelled stays away, and so does what nobody
    knows enough about: once Slurm has forgotten the job, only a decision that was made knowing its end is one.
    """
    ledger = Ledger(run)
    newest = ledger.newest()
    if newest is not None and newest.job == by:
        return Action("start", "goes on as itself")
    mine = [attempt for attempt in ledger.attempts() if attempt.job == job]
    seen = parse_show_job(text, restart=mine[-1].restart if mine else 0, exit_code=None, succeeds=succeeds)
    decision = ledger.decision()
    known = decision if decision is not None and _is_of_its_end(decision, job, by) else None
    restart = max(seen.restart, seen.restarts, known.restart if known else 0)
    stopped = StoppedError.exit_code
    if seen.state and seen.state not in queries.OVER:
        return Action("exit", f"job {job} is {seen.state} still", stopped)
    if newest is not None and newest.job not in (job, *succeeds):
        return Action("exit", f"job {newest.job} has taken over already", stopped)
    if seen.state == "CANCELLED":
        return Action("exit", f"job {job} was cancelled; `gpt2hpc resume` goes on", stopped)
    if not seen.state and known is None:  # cancelled, perhaps
        return Action("exit", f"nobody knows any more how job {job} ended; `gpt2hpc resume` goes on", stopped)
    ended = dataclasses.replace(seen, job=job, state="RUNNING", restart=restart, restarts=restart)
    if own is not None:  # what that one kept away from, too
        ended = dataclasses.replace(ended, excluded=_merged(own.excluded, seen.excluded), required=own.required)
    action = read_and_decide(run, ended, by=by)
    return action if action.kind == "exit" else _started(action, action.exclude_nodes or ended.excluded, own)


def _is_of_its_end(decision: Decision, job: str, by: str) -> bool:
    """Whether the job was over, and not cancelled, when that was decided: by an earlier start of this guard, or by the job itself as it
    left. One that has but requeued itself may have been cancelled while it waited."""
    mine = decision.by == by and decision.action == "requeue"
    return decision.job == job and (mine or decision.action == "resubmit")


def _started(action: Action, exclude: str, own: Job | None) -> Action:
    """The start of the guard, or where it has nodes out of `exclude` its return to the queue."""
    bad = (
        []
        if own is None
        else sorted({*expand_nodes(own.nodes)} & {*expand_nodes(exclude)} - {*expand_nodes(own.required)})
    )
    action = dataclasses.replace(action, exclude_nodes=exclude, delay_s=0.0)
    if own is not None and bad and own.state == "RUNNING" and own.restarts < GIVES_BACK:
        return dataclasses.replace(
            action, kind="requeue", reason=f"takes over, but not on {', '.join(bad)}: {action.reason}"
        )
    return dataclasses.replace(action, kind="start", reason=f"takes over, {action.reason}")


def _merged(*lists: str) -> str:
    return ",".join(dict.fromkeys(node for nodes in lists for node in expand_nodes(nodes)))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpt2hpc.cluster.guard", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", required=True, help="the one that has failed")
    parser.add_argument("--by", required=True, help="the guard")
    parser.add_argument("--succeeds", default="", help="jobs that the guard continues, the newest first: 12,10")
    arguments = parser.parse_args(argv)
    if not arguments.run_dir.is_dir():
        raise RunDirError(f"{arguments.run_dir} is not a run directory; check the path")
    before = [each for each in arguments.succeeds.split(",") if each and each != arguments.job]
    failed, *more = sys.stdin.read().splitlines() or [""]
    own = parse_show_job(more[-1], restart=0, exit_code=None) if more else None
    run = RunDir(arguments.run_dir)
    action = take_over(run, failed, job=arguments.job, by=arguments.by, succeeds=before, own=own)
    if own is None and action.kind == "start":
        # A script that asks of the other job alone may be an earlier version's, queued since, to which `requeue` means to go on.
        action = dataclasses.replace(action, kind="requeue", exclude_nodes="")
    cli.say(action.line(allow=action.kind == "requeue" and own is not None and not own.may_requeue))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
