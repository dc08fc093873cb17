"""`gpt2hpc submit`: train as a job that is restarted and resumed until it is finished.

`--cluster local` stays in the foreground on this machine: each time the ranks end it asks the same `decide()` that a
Slurm job asks, and starts them again after a preemption, a time limit or a crash within its budget.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from gpt2hpc import cli, config_io
from gpt2hpc.cluster import requeue
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.launch import LocalJob, SignalRelay, run_attempt
from gpt2hpc.cluster.slurm import Job
from gpt2hpc.errors import StoppedError, UsageError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.train import NPROC_HELP, RUN_DIR_HELP, describe, local_job

JOBS = ("train",)


def new_parser() -> jsonargparse.ArgumentParser:
    parser = config_io.new_parser(
        "submit [train]", "Train as a job that is restarted and resumed until it is finished."
    )
    parser.add_argument("--run-dir", type=str, default="runs/train", help=RUN_DIR_HELP)
    parser.add_argument(
        "--cluster", type=str, default="local", choices=["local"], help="Where: this machine, in the foreground."
    )
    parser.add_argument("--nodes", type=int, default=1, help="Machines; one with --cluster local.")
    parser.add_argument("--nproc", type=int, help=NPROC_HELP)
    parser.add_argument(
        "--time", type=float, metavar="MINUTES", help="Time limit of each attempt; it saves before and is restarted."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print settings, command and environment, and start nothing."
    )
    return parser


def main(argv: Sequence[str]) -> int:
    argv = _without_job(argv)
    options, config = config_io.parse(new_parser(), argv)
    if options.nodes != 1:
        raise UsageError(
            f"--nodes={options.nodes} needs a Slurm cluster; --cluster local is one machine, so use --nodes 1 and --nproc"
        )
    if options.time is not None and not options.time > 0:
        raise UsageError(f"--time={options.time} must be above 0 minutes")
    run, env = RunDir(Path(options.run_dir)), DistEnv.from_env(os.environ)
    limit_s = options.time * 60 if options.time else None
    if options.dry_run:
        cli.say(
            _rendered(describe(run, config, env, nproc=options.nproc, time_limit_s=limit_s), config_io.dump(config))
        )
        return 0
    job = local_job(run, config, env, nproc=options.nproc, time_limit_s=limit_s)
    return 0 if job is None else _supervise(job)


def _without_job(argv: Sequence[str]) -> Sequence[str]:
    """Drop the first word if it names the job, which is `train` where there is none."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in JOBS:
            raise UsageError(f"unknown job {argv[0]}; the jobs are {', '.join(JOBS)}")
        return argv[1:]
    return argv


def _supervise(job: LocalJob) -> int:
    """Attempt after attempt, until there is nothing left to do or no use in trying."""
    cli.say(f"job {job.job}: {job.nproc} ranks here, run directory {job.run.path}")
    restart = 0
    with SignalRelay().installed() as relay:
        while True:
            code = run_attempt(job, restart=restart, relay=relay)
            facts = Job(job.job, restart, restarts=restart, exit_code=code, cancelled=relay.last_attempt)
            action = requeue.read_and_decide(job.run, facts)
            if action.kind == "exit":
                cli.say(f"job {job.job} ends: {action.reason}")
                return action.exit_code
            cli.say(f"job {job.job} restarts in {action.delay_s:.0f} s: {action.reason}")
            restart += 1
            if not _slept(action.delay_s, relay):
                cli.say(f"job {job.job} ends: cancelled by the user")
                return StoppedError.exit_code


def _slept(seconds: float, relay: SignalRelay) -> bool:
    """Wait, unless a signal says that this is the end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not relay.last_attempt:
        time.sleep(0.1)
    return not relay.last_attempt


def _rendered(job: LocalJob, settings: str) -> str:
    """What would run, for a person to read."""
    variables = job.environment(0, restart=0, rendezvous="<temporary file>", job_end=None)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(
        [
            f"# {job.run.config}",
            settings,
            f"# environment of rank 0; the other ranks of {job.nproc} differ in RANK and LOCAL_RANK",
            *lines,
            f"# started once a rank, {job.nproc} times",
            shlex.join(job.command),
        ]
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
