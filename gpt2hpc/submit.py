"""`gpt2hpc submit`: train as a job that is restarted and resumed until it is finished.

`--cluster local` stays in the foreground on this machine: each time the ranks end it asks the same `decide()` that a
Slurm job asks, and starts them again after a preemption, a time limit or a crash within its budget.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonargparse

from gpt2hpc import cli, config_io, jobs
from gpt2hpc.cluster import requeue
from gpt2hpc.cluster.launch import LocalJob, SignalRelay, run_attempt
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.cluster.slurm import Job
from gpt2hpc.config import Config, grad_accum_steps
from gpt2hpc.errors import DataError, StoppedError, UsageError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.train import NPROC_HELP, RUN_DIR_HELP, describe, local_job

JOBS = ("train",)


def new_parser() -> jsonargparse.ArgumentParser:
    parser = config_io.new_parser("submit", "Train as a job that is restarted and resumed until it is finished.")
    parser.add_argument("--run-dir", type=str, default="runs/train", help=RUN_DIR_HELP)
    parser.add_argument(
        "--cluster", type=Literal["local"], default="local", help="Where: this machine, in the foreground."
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
    options, config = config_io.parse(new_parser(), _without_job(argv))
    if options.nodes != 1:
        raise UsageError(
            f"--nodes={options.nodes} needs a Slurm cluster; --cluster local is one machine, so use --nodes 1 and --nproc"
        )
    run, limit_s = RunDir(Path(options.run_dir)), _time_limit_s(options.time, config)
    if options.dry_run:
        job = describe(run, config, nproc=options.nproc, time_limit_s=limit_s)
        cli.say(_rendered(job, config_io.dump(config)))
        cli.say(f"# {_foretold(job, config)}")
        return 0
    local = local_job(run, config, nproc=options.nproc, time_limit_s=limit_s)
    return 0 if local is None else _supervise(local)


def _without_job(argv: Sequence[str]) -> Sequence[str]:
    """Drop the first word if it names the job, which is `train` where there is none."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in JOBS:
            hint = f"; did you mean --run-dir {argv[0]}?" if "/" in argv[0] else ""
            raise UsageError(f"unknown job {argv[0]}; the jobs are {', '.join(JOBS)}{hint}")
        return argv[1:]
    return argv


def _time_limit_s(minutes: float | None, config: Config) -> float | None:
    """Seconds of `--time`; UsageError where a run would stop as soon as it starts."""
    if minutes is None:
        return None
    margin_s = config.checkpoint.stop_margin_s
    if not minutes * 60 > margin_s:
        raise UsageError(
            f"--time={minutes} minutes must be above checkpoint.stop_margin_s={margin_s} seconds, in which a run stops to save"
        )
    return minutes * 60


def _supervise(job: LocalJob) -> int:
    """Attempt after attempt, until there is nothing left to do or no use in trying."""
    cli.say(f"job {job.job}: {cli.plural(job.nproc, 'rank')} here, run directory {job.run.path}")
    restart = 0
    with SignalRelay().installed() as relay:
        while not relay.last_attempt:
            code = run_attempt(job, restart=restart, relay=relay)
            facts = Job(job.job, restart, restarts=restart, exit_code=code, cancelled=relay.last_attempt)
            action = requeue.read_and_decide(job.run, facts)
            if action.kind == "exit":
                cli.say(f"job {job.job} ends: {action.reason}")
                return action.exit_code
            cli.say(f"job {job.job} restarts in {action.delay_s:.0f} s: {action.reason}")
            restart += 1
            _sleep(action.delay_s, relay)
    cli.say(f"job {job.job} ends: {requeue.TOLD_TO_END}")
    return StoppedError.exit_code


def _sleep(seconds: float, relay: SignalRelay) -> None:
    """Wait, unless a signal says that this is the end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not relay.last_attempt:
        time.sleep(0.1)


def _foretold(job: LocalJob, config: Config) -> str:
    """What a start would do; raises what it would refuse, but for data, which may be prepared later."""
    config_io.changes(job.run, config)
    grad_accum_steps(config, world_size=job.nproc)
    try:
        jobs.check_start(job.run, config, world_size=job.nproc)
    except DataError as error:
        return f"a start would be refused: {error.line}"
    if Ledger(job.run).is_finished(config.train.steps):
        return "the run is finished, so nothing would start"
    newest = Ledger(job.run).newest()
    if newest is not None and Ledger(job.run).seems_alive(newest):
        return f"a start would be refused: attempt {newest.number} runs on {newest.host}"
    if job.run.has_checkpoints:
        return "it would resume from the newest checkpoint that is whole"
    return "it would start at step 0"


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
            f"# started {cli.plural(job.nproc, 'time')}, once for each rank",
            shlex.join(job.command),
        ]
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
