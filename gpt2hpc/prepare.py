"""`gpt2hpc prepare`: text in, uint16 shards and a manifest out; alone, or as one of many tasks that share the units.

Three steps: `plan` cuts the sources into units, `encode` does those of the task that nobody has done, `finalize` writes the
manifest. Without --step all three, here. Any step may be repeated, killed or run twice at once: what is done stays done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2hpc import cli, prepare_options
from gpt2hpc.cluster.dist_env import job_name
from gpt2hpc.cluster.signals import SignalFlag
from gpt2hpc.data import encode, hub, manifest, plan, sources
from gpt2hpc.data.demo import DEMO
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.meter import Meter
from gpt2hpc.data.plan import Plan, Reading
from gpt2hpc.data.readers import Bad
from gpt2hpc.data.shards import SPLITS
from gpt2hpc.data.sources import Selection, SourceFile
from gpt2hpc.data.workers import DOWNLOADS, Task, Work, allowed_cores
from gpt2hpc.errors import CrashBudgetError, DataError, StoppedError, UsageError

STEPS = ("all", "plan", "encode", "finalize")
MOST_RESTARTS = 20
"""Of a task that is stopped each time before it has done a unit."""


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc prepare", description="Tokenize text with GPT-2's encoding into shards to train on."
    )
    prepare_options.add_plan_options(parser)
    prepare_options.add_task_options(parser)
    parser.add_argument("--step", choices=STEPS, default="all", help="do only this step (default: all)")
    parser.add_argument(
        "--task",
        default="0/1",
        metavar="K/N",
        help="this is task K of N, numbered from 0, with --step encode (default: 0/1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    cli.add_examples(
        parser,
        "gpt2hpc prepare --source my_texts/ --out data/mine",
        "gpt2hpc prepare --source HuggingFaceFW/fineweb-edu --config sample-10BT --out data/edu --dry-run",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    prepare_options.check(arguments)
    task, tasks = prepare_options.task_of(arguments.task)
    if tasks > 1 and arguments.step != "encode":
        raise UsageError(f"--task={arguments.task} needs --step encode; without --task all units are done here")
    if arguments.dry_run:
        describe(new_plan(arguments), arguments.out)
        return 0
    the_plan = settled_plan(arguments, look_again=arguments.step in ("all", "plan"))
    if arguments.step == "plan":
        describe(the_plan, arguments.out, units=False)
    try:
        if arguments.step in ("all", "encode"):
            encode_share(the_plan, arguments, task=task, tasks=tasks)
        last = arguments.step == "encode" and _is_last(arguments.out, the_plan)
        if last or arguments.step in ("all", "finalize"):
            made = encode.finalize(arguments.out, the_plan, arguments.max_bad_documents)
            hub.clear_downloads(arguments.out / DOWNLOADS)
            say_totals(made)
    except OSError as error:
        where = error.filename or arguments.out
        raise DataError(
            f"{where}: {error.strerror or error}; what is done is kept, so mend it and run the same command again"
        ) from error
    return 0


# The plan -----------------------------------------------------------------------------------------------------------


def new_plan(arguments: argparse.Namespace) -> Plan:
    """Look at the sources; those on the Hub stay at the commits of a plan that is there."""
    if not arguments.source:
        return _there(arguments)
    commits = plan.load(arguments.out).commits if plan.asked_before(arguments.out) is not None else {}
    selection = Selection(arguments.config, arguments.split, arguments.revision, commits)
    files = sources.find_files(arguments.source, selection)
    reading = Reading(arguments.document_separator, arguments.text_key)
    return plan.make(files, reading, arguments.val_fraction, unit_tokens=arguments.unit_tokens)


def check_sources(arguments: argparse.Namespace) -> None:
    """Raise UsageError or DataError where there is nothing to plan, as far as can be told without the Hub."""
    if plan.asked_before(arguments.out) is not None:
        return
    if not arguments.source:
        raise UsageError(f"--out={arguments.out} holds no plan yet; give a --source, as a directory of texts or `demo`")
    for source in arguments.source:
        sources.check_name(source)


def settled_plan(arguments: argparse.Namespace, *, look_again: bool) -> Plan:
    """The plan in --out, made first if there is none; DataError where that one was asked to be another.

    `look_again` compares it with the sources as they are now; a task of many does not, which may have no network.
    """
    out = arguments.out
    before = plan.asked_before(out)
    if before is None:
        check_sources(arguments)
        if (out / manifest.NAME).exists() or any(out.glob("unit_*.json")) or any(out.glob("*_[0-9]*.npy")):
            raise DataError(f"--out={out} holds data without its {plan.NAME}; choose another --out, or delete it first")
        return _published(arguments)
    if not arguments.source:
        return _there(arguments)
    may_replace = look_again and not any(out.glob("unit_*.json"))  # nothing is lost by a better plan
    now = prepare_options.asked(arguments)
    if now["source"] != before.get("source"):  # a file that was freed can no longer be told from a dataset's name
        absolute = [os.path.abspath(each) for each in arguments.source]  # noqa: PTH100
        now["source"] = before["source"] if absolute == before.get("source") else now["source"]
    if may_replace and _differing(before, now):
        (out / plan.NAME).unlink(missing_ok=True)
        return _published(arguments)
    _check_same(out, before, now)
    there = plan.load(out)
    if look_again and not any(_was_freed(file) for file in there.files):
        made = new_plan(arguments)
        if may_replace and made.sha256 != there.sha256:
            (out / plan.NAME).unlink(missing_ok=True)
        return plan.publish(out, made, now)
    return there


def _there(arguments: argparse.Namespace) -> Plan:
    """The plan in --out where no --source is given; DataError where an option says otherwise than it was asked."""
    there = plan.load(arguments.out)
    _check_same(arguments.out, plan.asked_before(arguments.out) or {}, prepare_options.given(arguments))
    return there


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key, value in now.items() if before.get(key) != value]


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if differing := _differing(before, now):
        listed = ", ".join(f"{key.replace('_', '-')} was {before.get(key)}" for key in differing)
        raise DataError(
            f"--out={out} holds data of another source or rule ({listed}); choose another --out, or delete it first"
        )


def _published(arguments: argparse.Namespace) -> Plan:
    """A plan made now."""
    made = new_plan(arguments)
    for line in plan.warnings(made, arguments.unit_tokens):
        cli.warn(line)
    return plan.publish(arguments.out, made, prepare_options.asked(arguments))


def _was_freed(file: SourceFile) -> bool:
    """Gone, as `--free sources` leaves it: then the plan alone tells what there is to do."""
    return file.format != DEMO and not file.is_remote and not Path(file.path).exists()


def describe(the_plan: Plan, out: Path, *, units: bool = True) -> None:
    """Say what would be done."""
    cli.say("\n".join(described(the_plan, out, units=units)))


def described(the_plan: Plan, out: Path, *, units: bool = True) -> Iterator[str]:
    """What would be done, in lines."""
    yield (
        f"{cli.plural(len(the_plan.files), 'file')}, {the_plan.bytes / 1e6:,.2f} MB of text (about "
        f"{the_plan.bytes / plan.BYTES_PER_TOKEN / 1e6:,.1f} Mtok) in {cli.plural(len(the_plan.units), 'unit')}, to {out}"
    )
    for unit in the_plan.units if units else ():
        yield f"unit {unit.index}: {' and '.join(the_plan.splits(unit))}, {unit.bytes:,} bytes of text"
        for piece in unit.pieces:
            file = the_plan.files[piece.file]
            part = "" if (piece.start, piece.stop) == (0, file.bytes) else f"  {piece.start} to {piece.stop}"
            yield f"  {file.path}{part}"


# The work -----------------------------------------------------------------------------------------------------------


def encode_share(the_plan: Plan, arguments: argparse.Namespace, *, task: int, tasks: int) -> None:
    """Do those units of task `task` of `tasks` that are not done; StoppedError if a signal came before the last."""
    share = the_plan.share(task, tasks)
    lacking = encode.missing(arguments.out, the_plan, share)
    whose = f"of task {task} of {tasks} " if tasks > 1 else ""
    if len(lacking) < len(share):
        cli.say(f"{cli.plural(len(share) - len(lacking), 'unit')} {whose}done already")
    if not lacking:
        return
    processes = min(arguments.processes or allowed_cores(), len(lacking))
    cli.say(f"{cli.plural(len(lacking), 'unit')} {whose}to do; processes: {processes}")
    signals = SignalFlag()
    signals.install()
    work = Work(
        arguments.out, the_plan, arguments.tokenizer, arguments.max_bad_documents, {"job": job_name(os.environ)}
    )
    runner = Task(work, processes=processes, free=_freed(arguments.free), stop=lambda: bool(signals.stop))
    meter = Meter(lacking)
    bad: list[Bad] = []
    try:
        for unit, record in runner.run(lacking, meter.show):
            if record is None:
                cli.say(f"unit {unit.index} was done by another task meanwhile")
            elif record.bad:
                cli.warn(
                    f"unit {unit.index}: {cli.plural(len(record.bad), 'document')} left out, the first: {record.bad[0].where}"
                )
                bad += record.bad
                encode.check_bad(bad, arguments.max_bad_documents)
    finally:
        meter.close(runner.counts)
    if signals.stop:
        _stopped(runner.counts.units, len(lacking))


def _is_last(out: Path, the_plan: Plan) -> bool:
    """Whether all units are done, so that this task may write the manifest; says what is left to others."""
    left = encode.missing(out, the_plan, the_plan.units)
    if left:
        cli.say(
            f"{cli.plural(len(left), 'unit')} of other tasks not done yet ({encode.ranges([unit.index for unit in left])})"
        )
    return not left


def _freed(what: str) -> Any:
    """Which files to delete once their units are done."""

    def free(file: SourceFile) -> bool:
        return what != "nothing" and (file.is_remote or (what == "sources" and file.format != "demo"))

    return free


def _stopped(done: int, lacking: int) -> None:
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if done == 0 and restarts >= MOST_RESTARTS:
        raise CrashBudgetError(
            f"stopped {restarts + 1} times, and this time again before a unit was done; give it more time, or plan anew with a "
            "smaller --unit-tokens"
        )
    raise StoppedError(
        f"stopped with {done} of {lacking} units done; run the same command again: it does the others alone"
    )


def say_totals(manifest: Manifest) -> None:
    for split in SPLITS:
        documents = manifest.documents(split) or 0
        cli.say(f"{split:5} {manifest.tokens(split):,} tokens of {cli.plural(documents, 'document')}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
