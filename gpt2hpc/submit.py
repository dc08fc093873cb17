"""`gpt2hpc submit [train]`: train as a job that is restarted and resumed until it is finished; `submit prepare` and `submit pipeline`
are next door.

On Slurm it is a batch job that requeues itself. `--cluster local` stays in the foreground on this machine: each time the
ranks end it asks the same `decide()` that a Slurm job asks, and starts them again.
"""

from __future__ import annotations

import importlib
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from gpt2hpc import cli, config_io, config_origins, dry_run, jobs, starting, train_job
from gpt2hpc.cluster import batch, foreground
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.cluster.supervisor import supervise
from gpt2hpc.config import Config
from gpt2hpc.config_rules import grad_accum_steps
from gpt2hpc.errors import ConfigError, DataError, UsageError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.train import describe, local_job

JOBS = {"prepare": "gpt2hpc.prepare_array", "pipeline": "gpt2hpc.pipeline"}
"""Beside `train`, which is what is meant where none is named."""


def new_parser() -> jsonargparse.ArgumentParser:
    parser = config_io.new_parser("submit", "Train as a job that is restarted and resumed until it is finished.")
    train_job.add_options(parser)
    cli.add_examples(
        parser,
        "gpt2hpc submit --nodes 4 --preset gpt2-350m --data.dir data/mine --run-dir runs/mine --dry-run",
        "gpt2hpc submit --cluster local --preset smoke --data.dir data/mine --nproc 2",
        "gpt2hpc submit prepare --source my_texts/ --out data/mine --array 64",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in JOBS:
        code: int = importlib.import_module(JOBS[argv[0]]).main(argv[1:])
        return code
    argv = _without_job(argv)
    options, config = config_io.parse(new_parser(), argv)
    train_job.check_numbers(options)
    if options.quiet:
        cli.be_quiet()
    cluster = _cluster(options)
    run = RunDir(Path(options.run_dir))
    if not options.dry_run:
        starting.refuse_a_misnamed_run(run, argv)
    if cluster == "slurm":
        return _on_slurm(run, config, options, argv)
    if wanted := train_job.for_slurm(options):
        raise UsageError(
            f"{wanted[0]} needs a Slurm cluster; --cluster {cluster} is one machine, so use --nodes 1 and --nproc"
        )
    return _debug(run, config) if cluster == "debug" and not options.dry_run else _here(run, config, options, argv)


def _without_job(argv: Sequence[str]) -> Sequence[str]:
    """Drop the first word if it names the job, which is `train` where there is none."""
    if argv and not argv[0].startswith("-"):
        if argv[0] != "train":
            hint = f"; did you mean --run-dir {argv[0]}?" if "/" in argv[0] else ""
            raise UsageError(f"unknown job {argv[0]}; the jobs are {', '.join(['train', *JOBS])}{hint}")
        return argv[1:]
    return argv


def _cluster(options: jsonargparse.Namespace) -> str:
    """`auto` by what is there; what only Slurm can do, and what is only shown, does not need it here."""
    if options.cluster != "auto":
        return str(options.cluster)
    return "slurm" if train_job.for_slurm(options) or shutil.which("sbatch") else "local"


# Here ---------------------------------------------------------------------------------------------------------------


def _here(run: RunDir, config: Config, options: jsonargparse.Namespace, argv: Sequence[str]) -> int:
    minutes = train_job.time_limit_min(options.time, config)
    limit_s = None if minutes is None else minutes * 60
    nproc = options.nproc or options.gpus_per_node or None
    if options.dry_run:
        job = describe(run, config, nproc=nproc, time_limit_s=limit_s)
        cli.say(dry_run.local_text(job, config_origins.lines(config, argv, run)))
        _foretell(run, config, argv, world_size=job.nproc)
        return 0
    local = local_job(run, config, nproc=nproc, time_limit_s=limit_s)
    return 0 if local is None else supervise(local)


def _debug(run: RunDir, config: Config) -> int:
    """One rank in this process, where a debugger can hold it."""
    from submitit import DebugExecutor

    if local_job(run, config, nproc=1) is None:
        return 0
    code: int = DebugExecutor(folder=run.slurm).submit(jobs.Train(str(run.path))).result()
    return code


def _foretell(run: RunDir, config: Config, argv: Sequence[str], *, world_size: int) -> None:
    """Say what a start would do; raises what it would refuse, but for what may be otherwise by then, such as the data."""
    config_io.changes(run, config)
    grad_accum_steps(config, world_size=world_size)
    if refusal := _refusal(run, config, argv, world_size=world_size):
        cli.warn(f"a start would be refused: {refusal}")
        cli.say(f"# a start would be refused: {refusal}")
    else:
        cli.say(f"# {_foretold(run, config)}")


def _refusal(run: RunDir, config: Config, argv: Sequence[str], *, world_size: int) -> str | None:
    if before := batch.queued(run):
        return f"job {before} of this run is in the queue already"
    if (other := foreground.find(run)) is not None:
        return f"job {other.job} works on it, pid {other.pid} on {other.host}"
    newest = Ledger(run).newest()
    try:
        starting.refuse_a_misnamed_run(run, argv)
    except ConfigError as error:
        return error.line
    try:
        starting.check_start(run, config, world_size=world_size)
    except DataError as error:
        return error.line
    if newest is not None and Ledger(run).seems_alive(newest) and not Ledger(run).is_finished(config.train.steps):
        return f"attempt {newest.number} runs on {newest.host}"
    return None


def _foretold(run: RunDir, config: Config) -> str:
    if Ledger(run).is_finished(config.train.steps):
        return "the run is finished, so nothing would start"
    if run.has_checkpoints:
        return "it would resume from the newest checkpoint that is whole"
    return "it would start at step 0"


# On Slurm -----------------------------------------------------------------------------------------------------------


def _on_slurm(run: RunDir, config: Config, options: jsonargparse.Namespace, argv: Sequence[str]) -> int:
    job, chosen = train_job.batch_job(run, config, options)
    whence = "flag" if any(word.partition("=")[0] == "--run-dir" for word in argv) else "default"
    chosen.note("run-dir", job.run.path, whence)
    chosen.note("guard", str(job.guard).lower(), "flag" if job.guard else "default")
    chosen.note("signal", f"USR2@{job.stop_margin_s}", "checkpoint.stop_margin_s")
    train_job.warn_of_site(job, config)
    if options.dry_run:
        cli.say(train_job.rendered(job, chosen, config, argv))
        _foretell(job.run, config, argv, world_size=job.world_size)
        return 0
    config, _ = starting.check_start(job.run, config, world_size=job.world_size)
    if number := train_job.submit(job, config, quiet=options.quiet):
        cli.say(f"log: {job.log.replace('%j', number)}")
        where = shlex.quote(options.run_dir)
        cli.say(
            f"watch it with `gpt2hpc status {where}` and `gpt2hpc logs -f {where}`, cancel it with `gpt2hpc cancel {where}`"
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
