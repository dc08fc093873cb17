"""`gpt2hpc selftest`: does this installation, or this image, work on this machine? It tries, in less than a minute.

Exit code 0, or 8 if something failed; each line says what to do about it. It writes to a directory of its own below
TMPDIR, and needs no network, no HOME and no name for its user.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from gpt2hpc import __version__, cli
from gpt2hpc.cluster import launch, signals
from gpt2hpc.errors import MissingError
from gpt2hpc.finding import State, Timed, to_json
from gpt2hpc.trials import rounds
from gpt2hpc.trials.bench import Bench, Device

PLACE = "temporary directory"
LEAST_BYTES = 200_000_000
"""What the trials write, with room for a compiler's own files."""
EPILOG = (
    "Each line is OK or FAIL, with seconds and, where it failed, what to do. Exit code: 0, or 8 if something failed."
)


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc selftest",
        description="Try out whether this installation works here: packages, tokenizer, a step of GPT-2, torch.compile, two processes, "
        "and a training that is stopped and resumed. Writes to a temporary directory only, needs no network; under a minute.",
        epilog=EPILOG,
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    device.add_argument("--gpu", action="store_true", help="on a GPU (default: where there is one)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    cli.add_examples(
        parser,
        "gpt2hpc selftest                  # on a node that computes: srun -N1 --gpus-per-node=2 gpt2hpc selftest",
        "gpt2hpc selftest --cpu --json     # in an image: apptainer exec gpt2hpc.sif gpt2hpc selftest --cpu --json",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    with signals.as_interrupts():  # of `scancel` or `timeout`: nothing stays behind
        return _tried(arguments)


def _tried(arguments: argparse.Namespace) -> int:
    gpus = 0 if arguments.cpu else launch.count_gpus()
    device: Device = "cuda" if arguments.gpu or gpus else "cpu"
    if not arguments.json:
        cli.say(f"gpt2hpc {__version__} on {os.uname().nodename}, tried {_on(device, gpus)}")
    results: list[Timed] = []
    with contextlib.closing(_results(device, gpus)) as found:
        for result in found:
            results.append(result)
            if not arguments.json:
                cli.say(result.line)
    failed = sum(result.state == "FAIL" for result in results)
    if arguments.json:
        cli.say(to_json(results))
    else:
        cli.say(
            f"{failed} of {len(results)} failed"
            if failed
            else f"all {len(results)} are well: this installation works here"
        )
    return MissingError.exit_code if failed else 0


def _results(device: Device, gpus: int) -> Generator[Timed]:
    """Of the place to write first; where there is none nothing else can be tried."""
    began = time.monotonic()
    try:
        folder = Path(tempfile.mkdtemp(prefix="gpt2hpc-selftest-"))
    except OSError as error:
        text = f"there is none to write to ({error.strerror}); set TMPDIR to a directory of yours, or bind one to /tmp"
        yield Timed(PLACE, "FAIL", text, round(time.monotonic() - began, 2))
        return
    try:
        yield _place(folder, began)
        yield from rounds.made(Bench(device, folder, gpus), os.environ)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path, began: float) -> Timed:
    """The directory for temporary files; Python takes another without a word where TMPDIR cannot be used."""
    named, free = os.environ.get("TMPDIR"), shutil.disk_usage(folder).free
    state: State = "FAIL"
    if named and Path(named).resolve() != folder.parent.resolve():
        text = (
            f"TMPDIR={named} cannot be written to, and {folder.parent} is taken in its place; make it, or set another"
        )
    elif free < LEAST_BYTES:
        text = f"{folder.parent} has {free / 1e6:.0f} MB left, and {LEAST_BYTES / 1e6:.0f} MB are wanted; set TMPDIR to a larger one"
    else:
        state, text = "OK", f"{folder.parent}, {free / 1e9:,.1f} GB free"
    return Timed(PLACE, state, text, round(time.monotonic() - began, 2))


def _on(device: Device, gpus: int) -> str:
    return "on the CPU" if device == "cpu" else f"on {cli.plural(gpus, 'GPU')}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
