"""A training as a batch job: what options, site and settings make of it, and its way into the queue."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonargparse

from gpt2hpc import cli, config_origins, dry_run, jobs, opening, starting
from gpt2hpc.cluster import batch, choices, foreground, inventory, job_environment, site_warnings, slurm
from gpt2hpc.cluster.batch import BatchJob
from gpt2hpc.cluster.choices import Choices
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import Config
from gpt2hpc.config_rules import warnings
from gpt2hpc.data import hub
from gpt2hpc.errors import RunDirError, UsageError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.train import RUN_DIR_HELP

_FOR_SLURM = ("partition", "account", "qos", "constraint", "exclude", "cpus_per_task", "mem", "container", "runtime")
_OPTIONS = (*_FOR_SLURM, "nodes", "gpus_per_node", "nproc", "time", "job_name", "site")


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


def for_slurm(options: jsonargparse.Namespace) -> list[str]:
    """Those that are given and that only Slurm can honour, as they are written."""
    given = {"nodes": None if options.nodes == 1 else options.nodes, **{name: options[name] for name in _FOR_SLURM}}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return [*flags, *(["--guard"] if options.guard else [])]


def check_numbers(options: jsonargparse.Namespace) -> None:
    """Raise UsageError for a number that cannot be."""
    for name in ("nodes", "nproc", "cpus_per_task", "gpus_per_node"):
        value, least = options[name], int(name != "gpus_per_node")
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')}={value} must be {least} or more")


def time_limit_min(text: str | None, config: Config) -> float | None:
    """Minutes of `--time`; UsageError where a run would stop as soon as it starts."""
    if text is None:
        return None
    minutes = slurm.exact_minutes(text)
    margin_s = config.checkpoint.stop_margin_s
    if not minutes * 60 > margin_s:
        raise UsageError(
            f"--time={text} is {minutes:g} min and must be above checkpoint.stop_margin_s={margin_s} seconds, "
            "in which a run stops to save"
        )
    return minutes


def rendered(job: BatchJob, chosen: Choices, config: Config, argv: Sequence[str]) -> str:
    """What would be submitted, each value with its origin, for a person to read and for a shell."""
    sections = {
        "Asked of Slurm, each with its origin": chosen.lines(),
        f"Settings, each with its origin ({job.run.config})": config_origins.lines(config, argv, job.run),
        "Environment of the ranks, beside yours": job_environment.described("set-up", job.site, os.environ),
        "Mounts of the container": job.mounts(),
    }
    return dry_run.with_sections(job.text(), sections)


def submit(job: BatchJob, config: Config, *, quiet: bool) -> str | None:
    """Write the settings, which have been checked, and hand the job to Slurm; its number, or None for a run that is finished."""
    starting.check_repo(config)
    for line in warnings(config):
        cli.warn(line)
    if opening.is_finished(job.run, config):
        return None
    refuse_if_queued(job.run)
    foreground.refuse_another(job.run, "")
    newest = Ledger(job.run).newest()
    if newest is not None and newest.world_size != job.world_size:
        cli.warn(
            f"the run goes on with {job.world_size} ranks instead of {newest.world_size}: the same data, other last bits"
        )
    with batch.as_before_if_refused(job.run):
        job.run.create()
        opening.settle(job.run, config)
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
    chosen = Choices({name: options[name] for name in _OPTIONS}, os.environ)
    run = RunDir(Path(os.path.abspath(run.path)))  # noqa: PTH100 -- links stay as they are
    nodes, minutes = chosen.of("nodes", 1), time_limit_min(chosen.of("time"), config)
    gpus = chosen.of("gpus_per_node")
    if config.train.device == "cpu" and options.gpus_per_node is None:
        gpus = 0
        chosen.note("gpus-per-node", gpus, "train.device=cpu")
    elif gpus is None:
        partition = chosen.of("partition") or chosen.site.sbatch.get("partition") or os.environ.get("SBATCH_PARTITION")
        if (gpus := inventory.gpus_of(partition)) is not None:
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
