"""`gpt2hpc train`: one attempt at training, here and now.

Alone it starts one process per GPU (or --nproc on the CPU) and waits. Where something else starts the ranks (torchrun,
srun) it is one of them. It resumes by itself from the newest whole checkpoint of its run directory.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from gpt2hpc import cli, config_io, jobs, opening, starting
from gpt2hpc.cluster import foreground
from gpt2hpc.cluster.dist_env import DistEnv, new_local_job
from gpt2hpc.cluster.launch import LocalJob, SignalRelay, count_gpus, run_attempt
from gpt2hpc.cluster.ledger import Cause, Ledger
from gpt2hpc.cluster.signals import SIGNALS, SignalFlag
from gpt2hpc.config import Config
from gpt2hpc.config_rules import warnings
from gpt2hpc.errors import EXIT_CODES, INTERNAL_ERROR, DivergedError, StoppedError, UsageError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import writers

RUN_DIR_HELP = "Directory of the run; a run that is there goes on from its newest checkpoint."
NPROC_HELP = "Processes to start (default: one per GPU, or 1 on the CPU)."

_DEADLY = set(signal.Signals) - set(SIGNALS)


def new_parser() -> jsonargparse.ArgumentParser:
    parser = config_io.new_parser("train", "Train here and now; the same command again resumes.")
    parser.add_argument("--run-dir", type=str, default="runs/train", help=RUN_DIR_HELP)
    parser.add_argument("--nproc", type=int, help=NPROC_HELP)
    parser.add_argument("--quiet", action="store_true", help=cli.QUIET_HELP)
    cli.add_examples(
        parser,
        "gpt2hpc train --preset smoke --data.dir data/mine --run-dir runs/mine --nproc 2",
        "gpt2hpc train --run-dir runs/mine       # goes on, with the settings it has",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    env = DistEnv.from_env(os.environ)
    if env.is_launched:
        return _one_rank(argv, env)
    options, config = config_io.parse(new_parser(), argv)
    if options.quiet:
        cli.be_quiet()
    run = RunDir(Path(options.run_dir))
    starting.refuse_a_misnamed_run(run, argv)
    job = local_job(
        run, config, nproc=options.nproc
    )  # not the batch job's that it may be called in, which is the user's
    if job is None:
        return 0
    with SignalRelay().installed() as relay, foreground.announced(job):
        code = run_attempt(job, restart=0, relay=relay)
        if (
            code - 128 in _DEADLY and not relay.last_attempt
        ):  # a rank that was killed cannot tell, but this process has seen it
            Ledger(run).close_for(job.job, 0, socket.gethostname(), Cause.CRASHED, code)
    return _exit_code(code, job, stopped=relay.last_attempt)


def _one_rank(argv: Sequence[str], env: DistEnv) -> int:
    signals = SignalFlag()
    signals.install()  # whatever starts ranks may signal them at any moment
    with jobs.refusal_noted(RunDir(_named_run_dir(argv)), env):
        options, config = config_io.parse(new_parser(), argv)
        if env.rank == 0:  # the others may be on a node that does not see the run, which the preflight tells better
            starting.refuse_a_misnamed_run(RunDir(Path(options.run_dir)), argv)
        if options.nproc is not None:
            raise UsageError(
                f"--nproc={options.nproc}, but RANK and WORLD_SIZE are set: this is one rank already; drop --nproc"
            )
    if options.quiet:
        cli.be_quiet()
    return jobs.Train(options.run_dir, config)(signals)


def _named_run_dir(argv: Sequence[str]) -> Path:
    """`--run-dir` of a command that may not parse."""
    named = [following for word, following in itertools.pairwise([*argv, ""]) if word == "--run-dir"]
    named += [word.partition("=")[2] for word in argv if word.startswith("--run-dir=")]
    return Path(named[0] if named and named[0] else "runs/train")


def local_job(run: RunDir, config: Config, *, nproc: int | None, time_limit_s: float | None = None) -> LocalJob | None:
    """Check all that can be checked without torch and write the settings; None if the run is finished."""
    jobs.require_torch()
    writers.check(config.train)
    local = describe(run, config, nproc=nproc, time_limit_s=time_limit_s)
    config, _ = starting.check_start(run, config, world_size=local.nproc)
    starting.check_repo(config)
    for line in warnings(config):
        cli.warn(line)
    if opening.is_finished(run, config):
        return None
    foreground.refuse_another(run, local.job)
    run.create()
    run.stop.unlink(missing_ok=True)  # an old wish; one that comes from now on counts
    opening.settle(run, config)
    return local


def describe(run: RunDir, config: Config, *, nproc: int | None, time_limit_s: float | None) -> LocalJob:
    """The local job that these settings make, with a name of its own; nothing is written."""
    if nproc is not None and nproc < 1:
        raise UsageError(f"--nproc={nproc} must be 1 or more")
    gpus = 0 if config.train.device == "cpu" else count_gpus()
    if gpus and nproc and nproc > gpus:
        raise UsageError(f"--nproc={nproc} is more than the {gpus} GPUs here; use --nproc {gpus}, or --device cpu")
    command = (
        sys.executable,
        "-m",
        "gpt2hpc.train",
        "--run-dir",
        str(run.path),
        *(["--quiet"] if cli.is_quiet() else []),
    )
    return LocalJob(command, run, nproc or max(1, gpus), new_local_job(), gpus=gpus, time_limit_s=time_limit_s)


def _exit_code(code: int, job: LocalJob, *, stopped: bool) -> int:
    """What the attempt's end means to the caller."""
    ledger = Ledger(job.run)
    if ledger.is_finished(config_io.load(job.run.config).train.steps):
        return 0
    outcome = ledger.own_outcome(job.job, 0)
    if outcome and outcome.cause is Cause.DIVERGED:
        return DivergedError.exit_code
    if outcome and outcome.cause is Cause.ERROR:
        return outcome.exit_code or INTERNAL_ERROR
    if outcome or stopped:
        cli.say("run the same command again to go on")
        return StoppedError.exit_code
    return code if code in EXIT_CODES else INTERNAL_ERROR


if __name__ == "__main__":
    sys.exit(cli.run(main))
