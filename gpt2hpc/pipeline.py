"""`gpt2hpc submit pipeline`: from text to an exported model as Slurm jobs, each waiting for the one before.

Prepare (an array), finalize, train (requeued as often as needed), then evaluate and export. A job whose predecessor has failed for
good is cancelled by Slurm instead of pending forever; the same command again does what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonargparse

from gpt2hpc import cli, config_io, evaluate, export, prepare, prepare_array, starting, train_job
from gpt2hpc.cluster import orders, queries, run_jobs, slurm, submitter
from gpt2hpc.cluster.array_job import ArrayJob
from gpt2hpc.cluster.batch import BatchJob
from gpt2hpc.config import Config
from gpt2hpc.data import hub, manifest
from gpt2hpc.errors import Gpt2hpcError, MissingError, UsageError
from gpt2hpc.run_dir import RunDir

MINUTES = {"evaluate": 120, "export": 30}
"""The time limit of what comes after a training, unless that has a shorter one."""
SHARED = ("partition", "account", "qos", "constraint", "exclude", "container", "runtime", "site")
"""Options of Slurm that hold for `prepare` too, unless --prepare has others."""


@dataclass(frozen=True)
class Verb:
    """A verb as a task of a batch job: what submitit pickles, by reference. The process ends with a documented exit code."""

    name: str
    arguments: tuple[str, ...]

    def __call__(self) -> int:
        return submitter.run_task(importlib.import_module(f"gpt2hpc.{self.name}").main, self.arguments, waited=True)


def new_parser() -> jsonargparse.ArgumentParser:
    parser = config_io.new_parser(
        "submit pipeline",
        "Prepare, train, evaluate and export as Slurm jobs that wait for each other. The same again does what is missing.",
    )
    train_job.add_options(parser)
    cli.add_examples(
        parser,
        "gpt2hpc submit pipeline --source texts/ --data.dir data/mine --run-dir runs/mine --nodes 4 --dry-run",
        "gpt2hpc submit pipeline --data.dir data/mine --prepare '--array 64 --partition cpu' --export '--push USER/NAME'",
    )
    parser.add_argument(
        "--source",
        action="append",
        metavar="S",
        help="Text, as for `gpt2hpc prepare`, which writes to --data.dir; may be given more than once; none where that is prepared.",
    )
    words = "Further options of `gpt2hpc {}`{}, in quotes, as '{}'."
    for verb, example in (
        ("prepare", "--array 64 --partition cpu --time 2:00:00"),
        ("evaluate", "--hellaswag /scratch/stage --time 4:00:00"),
        ("export", "--push USER/NAME"),
    ):
        named = ("submit prepare", "") if verb == "prepare" else (verb, " and a --time limit")
        parser.add_argument(f"--{verb}", type=str, default="", metavar="WORDS", help=words.format(*named, example))
    return parser


def main(argv: Sequence[str]) -> int:
    options, config = config_io.parse(new_parser(), argv)
    train_job.check_numbers(options)
    if options.quiet:
        cli.be_quiet()
    if options.cluster not in ("auto", "slurm"):
        raise UsageError(
            f"--cluster={options.cluster}: a pipeline is jobs of Slurm; run its commands one after the other instead"
        )
    if shutil.which("sbatch") is None and not options.dry_run:
        raise MissingError("sbatch is not on PATH, and a pipeline is jobs of Slurm; use a login node, or --dry-run")
    if options.source and hub.is_remote(config.data.dir):
        raise UsageError(f"--source, but --data.dir={config.data.dir} is prepared already; drop one of them")
    job, chosen = train_job.batch_job(RunDir(Path(options.run_dir)), config, options)
    train_job.warn_of_site(job, config)
    checks = (_evaluation(job, config, options.evaluate), _export(job, options.export))
    preparation = _preparation(config, options)
    if options.dry_run:
        _show(preparation, checks, train_job.rendered(job, chosen, config, argv))
        try:
            _check(job, config, argv, preparation)
        except Gpt2hpcError as error:
            cli.warn(f"a start would be refused: {error.line}")
        return 0
    config = _check(job, config, argv, preparation)
    finalize = prepare_array.submit(preparation, prepare_array.array_job(preparation)[0]) if preparation else None
    if finalize is not None:
        job = dataclasses.replace(job, dependency=f"afterok:{finalize}")
    elif preparation is not None:  # all of it was done already
        config, _ = starting.check_start(job.run, config, world_size=job.world_size)
    # Held until those that wait for it are known to it: it takes them along where it goes on as another job.
    training = train_job.submit(
        dataclasses.replace(job, options={**job.options, "hold": True}), config, quiet=options.quiet
    )
    numbers: list[str] = []
    try:
        for check in checks:
            numbers += check.submit(job.run, training)
    finally:
        if training:
            job.run.slurm.mkdir(parents=True, exist_ok=True)
            job.run.dependents.write_text("".join(f"{number}\n" for number in numbers), encoding="utf-8")
            orders.release(training)
    cli.say(
        f"watch it with `gpt2hpc status {shlex.quote(options.run_dir)}`; the same command again does what is missing"
    )
    return 0


def _check(job: BatchJob, config: Config, argv: Sequence[str], preparation: argparse.Namespace | None) -> Config:
    """Refuse what can be refused before the first job is submitted; the settings as any restart will find what they name."""
    train_job.refuse_if_queued(job.run)
    if preparation is None:
        starting.refuse_a_misnamed_run(job.run, argv)
        return starting.check_start(job.run, config, world_size=job.world_size)[0]
    prepare.check_sources(preparation)
    return starting.check_start_without_data(job.run, config, world_size=job.world_size)


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """What is wrong with an option's words is told with the option's name."""
    try:
        yield
    except (UsageError, ValueError) as error:  # ValueError: a quote that is not closed
        raise UsageError(f"{option}: {error}") from None


# Before the training ------------------------------------------------------------------------------------------------


def _preparation(config: Config, options: jsonargparse.Namespace) -> argparse.Namespace | None:
    """What `gpt2hpc submit prepare` is told; None where there is nothing to prepare."""
    if not options.source and (hub.is_remote(config.data.dir) or (Path(config.data.dir) / manifest.NAME).exists()):
        return None
    words = [word for each in options.source or () for word in ("--source", each)]
    words += ["--out", config.data.dir, "--cluster", "slurm"]
    for name in SHARED:
        if options[name] is not None:
            words += [f"--{name}", options[name]]
    with _named("--prepare"):
        return prepare_array.parsed([*words, *shlex.split(options.prepare)])


# After it -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A job that waits for the run to finish: `made` is what it leaves."""

    task: Verb
    job: ArrayJob
    made: Path

    def submit(self, run: RunDir, training: str | None) -> list[str]:
        """Its number, or nothing where what it makes is there, or being made, and the run has not gone on since."""
        if training is None and self.made.exists() and self.made.stat().st_mtime >= run.finished.stat().st_mtime:
            cli.say(f"{self.task.name}: {self.made} is there already")
            return []
        if training is None and (before := queries.first_queued(run_jobs.submitted(self.job.folder))):
            cli.say(f"{self.task.name}: job {before} is in the queue already")
            return []
        self.job.folder.mkdir(parents=True, exist_ok=True)
        number = self.job.submit_after(self.task, None if training is None else f"afterok:{training}")
        cli.say(f"job {number}: {self.task.name}, to {self.made}")
        return [number]


def _evaluation(job: BatchJob, config: Config, words: str) -> Check:
    """HellaSwag where its examples are named, and the loss of the whole validation split."""
    out = job.run.evaluation
    data = config.data.dir if hub.is_remote(config.data.dir) else os.path.abspath(config.data.dir)  # noqa: PTH100
    given: tuple[str, ...] = (str(job.run.path), "--val", data, "--hellaswag", config.train.hellaswag or "none")
    given += ("--device", config.train.device, "--out", str(out))
    with _named("--evaluate"):
        minutes, more = _limited(job, "evaluate", words)
        given += more
        arguments = evaluate.new_parser().parse_args(given)
    variables = {"MODEL": str(job.run.path), "OUT": str(out), "DATA": "" if hub.is_remote(data) else data}
    if Path(arguments.hellaswag).exists():
        variables["HELLASWAG"] = os.path.abspath(arguments.hellaswag)  # noqa: PTH100
    after = _after(job, "evaluate", variables, minutes, job.ranks_per_node, job.gpus_per_node)
    return Check(Verb("evaluate", given), after, out)


def _export(job: BatchJob, words: str) -> Check:
    out = job.run.exported
    given: tuple[str, ...] = (str(job.run.path), "--out", str(out))
    with _named("--export"):
        minutes, more = _limited(job, "export", words)
        given += more
        arguments = export.new_parser().parse_args(given)
    made = Path(os.path.abspath(arguments.out)) / export.RECORD  # noqa: PTH100
    variables = {"MODEL": str(job.run.path), "OUT": str(made.parent)}
    gpus = min(1, job.gpus_per_node)  # it needs none, but the partition may insist
    return Check(Verb("export", given), _after(job, "export", variables, minutes, 1, gpus), made)


def _limited(job: BatchJob, verb: str, words: str) -> tuple[int, tuple[str, ...]]:
    """Its time limit in minutes, `--time` of the words or what is usual, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--time", type=slurm.minutes)
    given, rest = parser.parse_known_args(shlex.split(words))
    usual = min(MINUTES[verb], job.minutes or MINUTES[verb])  # the partition may not let it have more
    return usual if given.time is None else given.time, tuple(rest)


def _after(job: BatchJob, verb: str, variables: dict[str, str], minutes: int, ranks: int, gpus: int) -> ArrayJob:
    return ArrayJob(
        folder=job.run.after / verb,  # else they would count as jobs of the training
        name=f"{job.name}-{verb}",
        cpus=job.options.get("cpus_per_task"),
        minutes=minutes,
        options={name: value for name, value in job.options.items() if name != "cpus_per_task"},
        site=job.site,
        image=job.image,
        variables=variables,
        block="evaluate",
        ranks=ranks,
        gpus=gpus,
    )


def _show(preparation: argparse.Namespace | None, checks: Sequence[Check], training: str) -> None:
    """Every script, in their order."""
    steps: list[tuple[str, str]] = []
    if preparation is None:
        cli.say("# The data is prepared already.")
    else:
        steps.append(
            ("prepare, an array; then one like it that finalizes", prepare_array.array_job(preparation)[0].text())
        )
    steps.append(("train, once the data is there", training))
    steps += [(f"{check.task.name}, once the run is finished", check.job.text()) for check in checks]
    for number, (title, text) in enumerate(steps, 1):
        cli.say(f"# ==== {number} of {len(steps)}: {title} ====\n{text}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
