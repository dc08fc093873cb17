"""`gpt2hpc status`: how far runs are, how fast and how well they go, and why one waits or has ended.

A run is read from its own files; Slurm, where there is one, is asked once for all of them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli, durable
from gpt2hpc.data import survey
from gpt2hpc.data.survey import Survey
from gpt2hpc.errors import DataError, UsageError
from gpt2hpc.reporting import run_status, runs, status_table
from gpt2hpc.reporting.run_status import ASK_SLURM_S, Inquiry, RunStatus
from gpt2hpc.run_dir import RunDir

WATCH_S = 5.0


class Reader:
    """Rows of the table, again and again; Slurm is not asked as often as that."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._inquiry = Inquiry()

    def rows(self) -> list[RunStatus | Survey]:
        """The runs and the prepared directories among the paths and right below them."""
        found = runs.within(self._paths, also=survey.is_prepared)
        trained = [path for path in found if not survey.is_prepared(path)]
        self._inquiry.renew(map(RunDir, trained))
        return [
            _surveyed(path) if survey.is_prepared(path) else run_status.read_status(RunDir(path), self._inquiry.answers)
            for path in found
        ]


def _surveyed(directory: Path) -> Survey:
    """One that cannot be read is a row like the others."""
    try:
        return survey.survey(directory)
    except DataError as error:
        cli.warn(error.line)
        return Survey(directory.name, "damaged", 0, 0, 0, None, None, None)


def text(rows: Sequence[RunStatus | Survey], paths: Sequence[Path], width: int | None) -> str:
    """A block where one run is named, else a table."""
    if len(rows) == 1 and len(paths) == 1 and isinstance(rows[0], RunStatus) and runs.is_run(paths[0]):
        return status_table.block(rows[0], width)
    return status_table.table(rows, width)


def _watch(reader: Reader, paths: Sequence[Path], every_s: float) -> int:
    """Draw again and again, until Ctrl-C."""
    try:
        if not cli.is_on_terminal(os.environ):
            while True:
                cli.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text(reader.rows(), paths, None)}\n")
                time.sleep(every_s)
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(
            console=Console(highlight=False), auto_refresh=False, screen=False, vertical_overflow="ellipsis"
        ) as live:
            while True:
                width, _ = shutil.get_terminal_size()
                shown = f"{text(reader.rows(), paths, width)}\n\n{time.strftime('%H:%M:%S')}, again every {every_s:g} s; Ctrl-C ends"
                live.update(Text(shown, no_wrap=True, overflow="crop"), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return 0


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(
        prog="gpt2hpc status",
        description="How far runs are, why one waits or has ended, and what to do then; and directories that are being prepared.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        default=[runs.DEFAULT],
        metavar="DIR",
        help="runs, prepared directories, or directories of them (default: runs); a single run is told in more lines",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument(
        "--watch", action="store_true", help="go on until Ctrl-C: drawn anew on a terminal, printed in a pipe"
    )
    parser.add_argument(
        "--every",
        type=float,
        default=WATCH_S,
        metavar="SECONDS",
        help=f"of --watch (default: {WATCH_S:g}); files are read so often, Slurm is asked every {ASK_SLURM_S:g} s at most",
    )
    cli.add_examples(
        parser,
        "gpt2hpc status                          # what is below runs/",
        "gpt2hpc status runs/mine --watch",
        "gpt2hpc status runs/mine data/mine --json",
    )
    arguments = parser.parse_args(argv)
    reader = Reader(arguments.paths)
    if arguments.watch and arguments.json:
        raise UsageError(
            "--watch is for people, --json for programs; ask for JSON again and again, or watch without it"
        )
    if not arguments.every > 0:
        raise UsageError(f"--every={arguments.every:g} must be above 0")
    if arguments.watch:
        return _watch(reader, arguments.paths, arguments.every)
    rows = reader.rows()
    if arguments.json:
        cli.say(durable.to_json([dataclasses.asdict(row) for row in rows]).rstrip())
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    cli.say(text(rows, arguments.paths, width))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
