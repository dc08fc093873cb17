"""`gpt2hpc submit [train]`: train as a job that is restarted and resumed until it is finished; `submit prepare` and `submit pipeline`
are next door.

On Slurm it is a batch job that requeues itself. `--cluster local` stays in the foreground on this machine: each time the
ranks end it asks the same `decide()` that a Slurm job asks, and starts them again.
"""

from __future__ import annotations

import importlib
import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonargparse

from gpt2hpc import cli, config_io, config_origins, dry_run, jobs, starting
from gpt2hpc.cluster import batch, choices, job_environment, queries, site_warnings, slurm
from gpt2hpc.cluster.batch import BatchJob
from gpt2hpc.cluster.choices import Choices
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.cluster.supervisor import supervise
from gpt2hpc.config import Config, grad_accum_steps, warnings
from gpt2hpc.data import hub
from gpt2hpc.errors import DataError, RunDirError, UsageError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.train import RUN_DIR_HELP, describe, local_job

JOBS = {"prepare": "gpt2hpc.prepare_array", "pipeline": "gpt2hpc.pipeline"}
"""Beside `train`, which is what is meant where none is named."""
ForSlurm = ("partition", "account", "qos", "constraint", "exclude", "cpus_per_task", "mem", "container", "runtime")
SLURM_OPTIONS = (*ForSlurm, "nodes", "gpus_per_node", "nproc", "time", "job_name", "site")


def new_parser() -> jsonargparse.ArgumentParser:
    parser = config_io.new_parser("submit", "Train as a job that is restarted and resumed until it is finished.")
    add_options(parser)
    cli.add_examples(
        parser,
        "gpt2hpc submit --nodes 4 --preset gpt2-350m --data.dir data/mine --run-dir runs/mine --dry-run",
        "gpt2hpc submit --cluster local --preset smoke --data.dir data/mine --nproc 2",
        "gpt2hpc submit prepare --source my_texts/ --out data/mine --array 64",
    )
    return parser


def add_options(parser: jsonargparse.ArgumentParser) -> None:
    """Those of a training as a job; the settings come after them."""
    parser.add_argument("--run-dir", type=str, default="runs/train", help=RUN_DIR_HELP)
    parser.add_argument(
        "--cluster",
        type=Literal["auto", "slurm", "local", "debug"],
        default="auto",
        help="Where: slurm; local, in the foreground here; debug, one rank in this very process. "
        "auto is slurm if sbatch is here or what is asked for needs it.",
    )
    parser.add_argument("--nodes", type=int, help="Nodes (default: 1); more than one needs Slurm.")
    parser.add_argument(
        "--gpus-per-node", type=int, help="GPUs on each node (default: the site's, or all that its nodes have)."
    )
    parser.add_argument("--nproc", type=int, help="Processes on each node (default: one per GPU, or 1 on the CPU).")
    parser.add_argument(
        "--time",
        type=str,
        metavar="LIMIT",
        help="Time limit of each attempt, which saves before and is restarted: minutes, HH:MM:SS or DAYS-HH:MM:SS.",
    )
    parser.add_argument(
        "--guard",
        action="store_true",
        help="On Slurm, let a second job wait, and take over where this one cannot requeue itself: its batch script was killed, say.",
    )
    parser.add_argument("--quiet", action="store_true", help=cli.QUIET_HELP)
    parser.add_argument("--dry-run", action="store_true", help="Print what would be submitted, and submit nothing.")
    choices.add_options(parser)


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in JOBS:
        code: int = importlib.import_module(JOBS[argv[0]]).main(argv[1:])
        return code
    options, config = config_io.parse(new_parser(), _without_job(argv))
    check_numbers(options)
    if options.quiet:
        cli.be_quiet()
    cluster = _cluster(options)
    run = RunDir(Path(options.run_dir))
    if cluster == "slurm":
        return _on_slurm(run, config, options, argv)
    wanted = [name for name in ForSlurm if options[name] is not None]
    several = options.nodes not in (None, 1)
    if several or wanted:
        what = f"--nodes={options.nodes}" if several else f"--{wanted[0].replace('_', '-')}={options[wanted[0]]}"
        raise UsageError(
            f"{what} needs a Slurm cluster; --cluster {cluster} is one machine, so use --nodes 1 and --nproc"
        )
    return _debug(run, config) if cluster == "debug" and not options.dry_run else _here(run, config, options, argv)


def check_numbers(options: jsonargparse.Namespace) -> None:
    """Raise UsageError for a number that cannot be."""
    for name in ("nodes", "nproc", "cpus_per_task", "gpus_per_node"):
        value, least = options[name], int(name != "gpus_per_node")
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')}={value} must be {least} or more")


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
    asks_for_slurm = (options.nodes or 1) > 1 or any(options[name] is not None for name in ForSlurm)
    return "slurm" if asks_for_slurm or shutil.which("sbatch") else "local"


def _time_limit_min(text: str | None, config: Config) -> float | None:
    """Minutes of `--time`; UsageError where a run would stop as soon as it starts."""
    if text is None:
        return None
    try:
        minutes: float = float(text)
    except ValueError:
        minutes = slurm.minutes(text)
    if not math.isfinite(minutes):
        raise UsageError(f"--time={text} is not a time; write minutes, HH:MM:SS or DAYS-HH:MM:SS")
    margin_s = config.checkpoint.stop_margin_s
    if not minutes * 60 > margin_s:
        raise UsageError(
            f"--time={text} is {minutes:g} min and must be above checkpoint.stop_margin_s={margin_s} seconds, "
            "in which a run stops to save"
        )
    return minutes


# Here ---------------------------------------------------------------------------------------------------------------


def _here(run: RunDir, config: Config, options: jsonargparse.Namespace, argv: Sequence[str]) -> int:
    minutes = _time_limit_min(options.time, config)
    limit_s = None if minutes is None else minutes * 60
    nproc = options.nproc or options.gpus_per_node or None
    if options.dry_run:
        job = describe(run, config, nproc=nproc, time_limit_s=limit_s)
        cli.say(dry_run.local_text(job, _settings(run, config, argv)))
        cli.say(f"# {_foretold(run, config, job.nproc)}")
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


def _foretold(run: RunDir, config: Config, world_size: int) -> str:
    """What a start would do; raises what it would refuse, but for data, which may be prepared later."""
    config_io.changes(run, config)
    grad_accum_steps(config, world_size=world_size)
    try:
        starting.check_start(run, config, world_size=world_size)
    except DataError as error:
        return f"a start would be refused: {error.line}"
    if Ledger(run).is_finished(config.train.steps):
        return "the run is finished, so nothing would start"
    newest = Ledger(run).newest()
    if newest is not None and Ledger(run).seems_alive(newest):
        return f"a start would be refused: attempt {newest.number} runs on {newest.host}"
    if run.has_checkpoints:
        return "it would resume from the newest checkpoint that is whole"
    return "it would start at step 0"


def _settings(run: RunDir, config: Config, argv: Sequence[str]) -> list[str]:
    return list(config_origins.lines(config, config_origins.of(_without_job(argv), run)))


# On Slurm -----------------------------------------------------------------------------------------------------------


def _on_slurm(run: RunDir, config: Config, options: jsonargparse.Namespace, argv: Sequence[str]) -> int:
    job, chosen = batch_job(run, config, options)
    whence = "flag" if any(word.partition("=")[0] == "--run-dir" for word in argv) else "default"
    chosen.note("run-dir", job.run.path, whence)
    chosen.note("guard", str(job.guard).lower(), "flag" if job.guard else "default")
    chosen.note("signal", f"USR2@{job.stop_margin_s}", "checkpoint.stop_margin_s")
    warn_of_site(job, config)
    if options.dry_run:
        cli.say(rendered_batch(job, chosen, config, argv))
        before = batch.queued(job.run)
        refused = f"a start would be refused: job {before} of this run is in the queue already"
        cli.say(f"# {refused if before else _foretold(job.run, config, job.world_size)}")
        return 0
    config, _ = starting.check_start(job.run, config, world_size=job.world_size)
    if number := submit(job, config, quiet=options.quiet):
        cli.say(f"log: {job.log.replace('%j', number)}")
        where = shlex.quote(options.run_dir)
        cli.say(
            f"watch it with `gpt2hpc status {where}` and `gpt2hpc logs -f {where}`, cancel it with `gpt2hpc cancel {where}`"
        )
    return 0


def rendered_batch(job: BatchJob, chosen: Choices, config: Config, argv: Sequence[str]) -> str:
    """What would be submitted, each value with its origin, for a person to read and for a shell."""
    sections = {
        "Asked of Slurm, each with its origin": chosen.lines(),
        f"Settings, each with its origin ({job.run.config})": _settings(job.run, config, argv),
        "Environment of the ranks, beside yours": job_environment.described("set-up", job.site, os.environ),
        "Mounts of the container": job.mounts(),
    }
    return dry_run.with_sections(job.text(), sections)


def submit(job: BatchJob, config: Config, *, quiet: bool) -> str | None:
    """Write the settings, which have been checked, and hand the job to Slurm; its number, or None for a run that is finished."""
    starting.check_repo(config)
    for line in warnings(config):
        cli.warn(line)
    if jobs.is_finished(job.run, config):
        return None
    refuse_if_queued(job.run)
    Ledger(job.run).refuse_if_taken("", 0)
    newest = Ledger(job.run).newest()
    if newest is not None and newest.world_size != job.world_size:
        cli.warn(
            f"the run goes on with {job.world_size} ranks instead of {newest.world_size}: the same data, other last bits"
        )
    with batch.as_before_if_refused(job.run):
        job.run.create()
        jobs.settle(job.run, config)
        number = job.submit(jobs.Rank(str(job.run.path), quiet=quiet))
    job.run.stop.unlink(missing_ok=True)  # an old wish
    ranks = f"{cli.plural(job.nodes, 'node')} × {cli.plural(job.ranks_per_node, 'rank')}"
    cli.say(f"job {number}: {ranks}, run directory {job.run.path}")
    return number


def refuse_if_queued(run: RunDir) -> None:
    """Raise RunDirError where a job of the run waits or runs."""
    if before := batch.queued(run):
        raise RunDirError(
            f"job {before} of --run-dir={run.path} is in the queue already and goes on by itself; "
            f"`scancel {before}` first to change it"
        )


def warn_of_site(job: BatchJob, config: Config) -> None:
    """Of files that the site deletes, and of a Hub that its nodes do not reach."""
    named = {"--run-dir": str(job.run.path)}
    if not hub.is_remote(config.data.dir):
        named["--data.dir"] = config.data.dir
    for line in [*site_warnings.purged(job.site, named), *site_warnings.offline(job.site, config)]:
        cli.warn(line)


def batch_job(run: RunDir, config: Config, options: jsonargparse.Namespace) -> tuple[BatchJob, Choices]:
    """The job that options, site and defaults make, and where each part of it comes from."""
    chosen = Choices({name: options[name] for name in SLURM_OPTIONS}, os.environ)
    run = RunDir(Path(os.path.abspath(run.path)))  # noqa: PTH100 -- links stay as they are
    nodes, minutes = chosen.of("nodes", 1), _time_limit_min(chosen.of("time"), config)
    gpus = chosen.of("gpus_per_node")
    if config.train.device == "cpu" and options.gpus_per_node is None:
        gpus = 0
        chosen.note("gpus-per-node", gpus, "train.device=cpu")
    elif gpus is None and (gpus := queries.gpus_of(chosen.of("partition"))) is not None:
        chosen.note("gpus-per-node", gpus, "what sinfo tells")
    ranks = chosen.of("nproc", gpus or 1)
    if gpus and ranks > gpus:
        raise UsageError(f"--nproc={ranks} is more than --gpus-per-node={gpus}; one process uses one GPU")
    data = None if hub.is_remote(config.data.dir) else Path(os.path.abspath(config.data.dir))  # noqa: PTH100
    image = chosen.image(options.container, binds=(run.path, *([data] if data else [])))
    given = chosen.sbatch_options()
    if (cores := chosen.of("cpus_per_task")) is not None:
        given["cpus_per_task"] = cores
    return (
        BatchJob(
            run=run,
            name=chosen.of("job_name", run.name),
            nodes=nodes,
            ranks_per_node=ranks,
            gpus_per_node=gpus or 0,
            minutes=None if minutes is None else math.ceil(minutes),
            stop_margin_s=math.ceil(config.checkpoint.stop_margin_s),
            options=given,
            site=chosen.site,
            begins_with=tuple(_beginnings(config)),
            image=image,
            data_dir=str(data) if image and data else "",
            guard=options.guard,
        ),
        chosen,
    )


def _beginnings(config: Config) -> list[str]:
    """What of this disk the run begins with or is measured by, to be seen in a container too."""
    named = (config.checkpoint.resume, config.train.init or "", config.train.hellaswag or "")
    return [os.path.abspath(path) for path in named if path and Path(path).exists()]  # noqa: PTH100


if __name__ == "__main__":
    sys.exit(cli.run(main))
