"""`gpt2hpc report`: one HTML file that tells of a run, or compares several; it needs no network and no other file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from gpt2hpc import cli, durable
from gpt2hpc.errors import RunDirError
from gpt2hpc.reporting import facts, page, run_status
from gpt2hpc.run_dir import RunDir


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc report",
        description="Write an HTML file of curves, restarts, cost, samples and settings; several runs are compared.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write it (default: report.html in the first RUN)"
    )
    cli.add_examples(
        parser,
        "gpt2hpc report runs/mine",
        "gpt2hpc report runs/a runs/b --out compared.html",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    out: Path = arguments.out or RunDir(arguments.runs[0]).report
    cli.check_out(out, example="report.html")
    for path in arguments.runs:
        if not path.is_dir():
            raise RunDirError(f"{path} is not a directory; give a run directory, or several")
    found = [facts.read(path) for path in arguments.runs]
    found = facts.told_apart(found)
    states = [run_status.read_status(run.run).state for run in found]
    out.parent.mkdir(parents=True, exist_ok=True)
    text = page.render(found, states, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    text = text.encode(errors="replace").decode()  # a directory's name may be no text
    durable.publish_text(out, text)
    for run in found:
        if run.curves.remarks:
            cli.warn(run.curves.remarks)
    cli.say(f"{out}: {cli.plural(len(found), 'run')}, {len(text.encode()) / 1e3:,.0f} kB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
