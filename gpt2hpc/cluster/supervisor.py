"""A local job from its first attempt to its last: what Slurm's requeue is to a batch job."""

from __future__ import annotations

import time

from gpt2hpc import cli
from gpt2hpc.cluster import foreground, requeue
from gpt2hpc.cluster.launch import LocalJob, SignalRelay, run_attempt
from gpt2hpc.cluster.ledger import Decision, Ledger
from gpt2hpc.cluster.slurm import Job
from gpt2hpc.errors import StoppedError
from gpt2hpc.run_dir import RunDir

STOPPED = "stopped by the user between two attempts"


def supervise(job: LocalJob) -> int:
    """Attempt after attempt, until there is nothing left to do or no use in trying; returns the exit code."""
    cli.note(f"job {job.job}: {cli.plural(job.nproc, 'rank')} here, run directory {job.run.path}")
    restart, ledger = 0, Ledger(job.run)
    with SignalRelay().installed() as relay, foreground.announced(job):
        while not relay.last_attempt:
            code = run_attempt(job, restart=restart, relay=relay)
            facts = Job(job.job, restart, restarts=restart, exit_code=code, cancelled=relay.last_attempt)
            action = requeue.read_and_decide(job.run, facts)
            if action.kind == "exit":
                cli.say(f"job {job.job} ends: {action.reason}")
                return action.exit_code
            cli.note(f"job {job.job} restarts in {action.delay_s:.0f} s: {action.reason}")
            _pause(action.delay_s, job.run, relay)
            if job.run.stop.exists() and not relay.last_attempt:  # no rank lives to see it
                job.run.stop.unlink(missing_ok=True)
                return _ends(ledger, Decision(job.job, restart, "stopped", STOPPED))
            restart += 1
        return _ends(ledger, Decision(job.job, restart, "cancelled", requeue.TOLD_TO_END))


def _pause(seconds: float, run: RunDir, relay: SignalRelay) -> None:
    """Wait, unless somebody says that this is the end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not relay.last_attempt and not run.stop.exists():
        time.sleep(0.1)


def _ends(ledger: Ledger, decision: Decision) -> int:
    ledger.remember(decision)
    cli.say(f"job {decision.job} ends: {decision.reason}")
    return StoppedError.exit_code
