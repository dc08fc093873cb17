"""`gpt2hpc submit prepare`: the steps of `gpt2hpc prepare` as Slurm jobs: plan here, an array that encodes, a job that finalizes."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc import cli, dry_run, prepare, prepare_options
from gpt2hpc.cluster import choices, job_environment, queries, site_warnings, slurm, submitter
from gpt2hpc.cluster.array_job import ArrayJob
from gpt2hpc.cluster.choices import Choices
from gpt2hpc.cluster.run_jobs import submitted
from gpt2hpc.data import encode, manifest
from gpt2hpc.errors import UsageError

TASKS, CORES = 16, 4


@dataclass(frozen=True)
class Step:
    """`gpt2hpc prepare` as a task of a batch job: what submitit pickles, by reference. The process ends with a documented exit code."""

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        return submitter.run_task(prepare.main, self.arguments)


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc submit prepare",
        description="Tokenize text as an array of Slurm jobs. Submit the same again after a failure: it does what is missing.",
    )
    prepare_options.add_plan_options(parser)
    prepare_options.add_task_options(parser)
    parser.add_argument(
        "--array", type=int, default=TASKS, metavar="N", help=f"tasks (default: {TASKS}, or one a unit)"
    )
    parser.add_argument("--at-once", type=int, metavar="K", help="tasks that may run at a time (default: all)")
    parser.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="where; local does it here and now; auto is slurm if sbatch is here (default: auto)",
    )
    parser.add_argument("--time", metavar="LIMIT", help="time limit of a task: minutes, HH:MM:SS or DAYS-HH:MM:SS")
    parser.add_argument("--dry-run", action="store_true", help="print plan and batch script, and submit nothing")
    choices.add_options(parser)
    cli.add_examples(
        parser,
        "gpt2hpc submit prepare --source my_texts/ --out data/mine --array 64 --dry-run",
        "gpt2hpc submit prepare --source HuggingFaceFW/fineweb-edu --out data/edu --array 64 --at-once 16 --partition cpu",
    )
    return parser


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    arguments = new_parser().parse_args(argv)
    prepare_options.check(arguments)
    for name in ("array", "at_once", "cpus_per_task"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}={value} must be 1 or more")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parsed(argv)
    if arguments.cluster == "local" or (
        arguments.cluster == "auto" and not arguments.dry_run and not shutil.which("sbatch")
    ):
        return prepare.main([*_words(arguments, source=True), *(["--dry-run"] if arguments.dry_run else [])])
    job, chosen = array_job(arguments)
    for line in site_warnings.purged(job.site, {"--out": job.variables["OUT"]}):
        cli.warn(line)
    if arguments.dry_run:
        return _dry_run(job, chosen, arguments)
    submit(arguments, job)
    return 0


def _dry_run(job: ArrayJob, chosen: Choices, arguments: argparse.Namespace) -> int:
    the_plan = prepare.new_plan(arguments)
    tasks = min(arguments.array, len(the_plan.units))
    sections = {
        f"{cli.plural(tasks, 'task')}, then one that finalizes; their work": prepare.described(the_plan, arguments.out),
        "What decides the tokens, each with its origin": _origins(arguments),
        "Asked of Slurm for each task, each with its origin": chosen.lines(),
        "Environment of the tasks, beside yours": job_environment.described("prepare set-up", job.site, os.environ),
        "Mounts of the container": job.mounts(),
    }
    cli.say(dry_run.with_sections(job.text(), sections))
    return 0


def _origins(arguments: argparse.Namespace) -> list[str]:
    parser = new_parser()
    keys = (*prepare_options.asked(arguments), "tokenizer", "max_bad_documents", "free", "processes", "array")
    values = {key: getattr(arguments, key) for key in keys}
    return [
        f"{key.replace('_', '-')} = {' '.join(value) if key == 'source' and value else value} "
        f"({'default' if value == parser.get_default(key) else 'flag'})"
        for key, value in values.items()
    ]


def submit(arguments: argparse.Namespace, job: ArrayJob) -> str | None:
    """Submit what is missing; the number of the job that finalizes, or None where nothing was."""
    the_plan = prepare.settled_plan(arguments, look_again=True)
    prepare.describe(the_plan, arguments.out, units=False)
    lacking = encode.missing(arguments.out, the_plan, the_plan.units)
    if not lacking and (arguments.out / manifest.NAME).exists():
        cli.say("every unit is done already")
        prepare.say_totals(encode.finalize(arguments.out, the_plan, arguments.max_bad_documents))
        return None
    if before := queries.first_queued(submitted(job.folder)):
        cli.warn(f"job {before} works on --out={arguments.out} already; two at once do no harm, and no good")
    tasks = min(arguments.array, len(the_plan.units))
    job.folder.mkdir(parents=True, exist_ok=True)
    words = _words(arguments)
    steps = [Step((*words, "--step", "encode", "--task", f"{task}/{tasks}")) for task in range(tasks)]
    arrays = job.submit(steps, at_once=arguments.at_once or tasks)
    last = job.submit_after(Step((*words, "--step", "finalize")), f"afterany:{':'.join(arrays)}")
    units = f"{len(lacking)} of {cli.plural(len(the_plan.units), 'unit')}"
    cli.say(
        f"{cli.plural(len(arrays), 'array')} {', '.join(arrays)}: {cli.plural(tasks, 'task')} for {units}; then job {last} finalizes"
    )
    cli.say(f"logs: {job.folder}")
    where = shlex.quote(str(arguments.out))
    cli.say(f"watch them with `gpt2hpc status {where}`, cancel them with `scancel {' '.join([*arrays, last])}`")
    return last


def _words(arguments: argparse.Namespace, *, source: bool = False) -> tuple[str, ...]:
    """The command line for `gpt2hpc prepare`; a task needs no source, since the plan is there."""
    words = ["--out", str(arguments.out.absolute()), "--tokenizer", arguments.tokenizer, "--free", arguments.free]
    words += ["--max-bad-documents", str(arguments.max_bad_documents)]
    if arguments.processes is not None:
        words += ["--processes", str(arguments.processes)]
    if source:
        for each in arguments.source or ():
            words += ["--source", each]
        for name, value in prepare_options.asked(arguments).items():
            if name != "source" and value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
    return tuple(words)


def array_job(arguments: argparse.Namespace) -> tuple[ArrayJob, Choices]:
    chosen = Choices(vars(arguments), os.environ)
    out = Path(os.path.abspath(arguments.out))  # noqa: PTH100 -- links stay as they are
    sources = tuple(os.path.abspath(each) for each in arguments.source or () if Path(each).exists())  # noqa: PTH100
    image = chosen.image(arguments.container, binds=(out, *map(Path, sources)))
    time_limit = chosen.of("time")
    job = ArrayJob(
        folder=out / "slurm",
        name=chosen.of("job_name", f"prepare-{out.name}"),
        cpus=chosen.of("cpus_per_task", CORES),
        minutes=None if time_limit is None else slurm.minutes(time_limit),
        options=chosen.sbatch_options(),
        site=chosen.site,
        image=image,
        variables={"OUT": str(out)},
        binds=sources,
    )
    return job, chosen


if __name__ == "__main__":
    sys.exit(cli.run(main))
