"""A local job from its first attempt to its last: what Slurm's requeue is to a batch job."""

from __future__ import annotations

import time

from gpt2hpc import cli
from gpt2hpc.cluster import requeue
from gpt2hpc.cluster.launch import LocalJob, SignalRelay, run_attempt
from gpt2hpc.cluster.slurm import Job
from gpt2hpc.errors import StoppedError


def supervise(job: LocalJob) -> int:
    """Attempt after attempt, until there is nothing left to do or no use in trying; returns the exit code."""
    cli.note(f"job {job.job}: {cli.plural(job.nproc, 'rank')} here, run directory {job.run.path}")
    restart = 0
    with SignalRelay().installed() as relay:
        while not relay.last_attempt:
            code = run_attempt(job, restart=restart, relay=relay)
            facts = Job(job.job, restart, restarts=restart, exit_code=code, cancelled=relay.last_attempt)
            action = requeue.read_and_decide(job.run, facts)
            if action.kind == "exit":
                cli.say(f"job {job.job} ends: {action.reason}")
                return action.exit_code
            cli.note(f"job {job.job} restarts in {action.delay_s:.0f} s: {action.reason}")
            restart += 1
            _sleep(action.delay_s, relay)
    cli.say(f"job {job.job} ends: {requeue.TOLD_TO_END}")
    return StoppedError.exit_code


def _sleep(seconds: float, relay: SignalRelay) -> None:
    """Wait, unless a signal says that this is the end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not relay.last_attempt:
        time.sleep(0.1)
