"""Which directories are runs: those that a user names, and those that lie in what a user names."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2hpc import cli
from gpt2hpc.cluster import unstarted
from gpt2hpc.errors import RunDirError, UsageError
from gpt2hpc.run_dir import RunDir

DEFAULT = Path("runs")


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`RUN`, the one that a verb is for: what `named` and `one` take."""
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="run directory (default: the only one in runs/)"
    )


def is_run(path: Path) -> bool:
    run = RunDir(path)
    return run.config.exists() or run.decision.exists() or run.attempts.is_dir() or run.job_logs.exists()


def within(paths: Sequence[Path], *, also: Callable[[Path], bool] = lambda path: False) -> list[Path]:
    """The runs among `paths` and right below them, and what is `also` looked for; RunDirError where one is no directory.

    What lies below them and may not be read is left out, with a warning.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise RunDirError(
                f"{path} is not a directory; give a run directory, or a directory of them{unstarted.hint()}"
            )
        if is_run(path) or also(path):
            found.append(path)
            continue
        for each in sorted(path.iterdir(), key=lambda each: (not each.name.isdigit(), each.name.zfill(9), each.name)):
            try:
                if is_run(each) or also(each):
                    found.append(each)
                elif each.is_dir() and not each.is_symlink():
                    found += array_of(each)
            except PermissionError as error:  # somebody else's, beside one's own
                cli.warn(f"{each} is left out: {error.strerror}")
    return found


def array_of(path: Path) -> list[Path]:
    """The runs of an array's tasks, `PATH/0`, `PATH/1`, …; none where it is no such directory."""
    tasks = [each for each in path.iterdir() if each.name.isdecimal() and is_run(each)]
    return sorted(tasks, key=lambda each: int(each.name))


def named(path: Path | None) -> list[RunDir]:
    """The run that is meant, or those of an array's tasks; without a name the only one in `runs/`."""
    if path is None:
        there = within([DEFAULT]) if DEFAULT.is_dir() else []
        if len(there) != 1:
            what = "there are several runs" if there else "there is no run"
            raise UsageError(
                f"{what} in {DEFAULT}/; name the run directory, as {there[0] if there else DEFAULT / 'mine'}"
            )
        return [RunDir(there[0])]
    if not path.is_dir():
        raise RunDirError(
            f"{path} is not a directory; name a run directory, as `gpt2hpc status` lists them{unstarted.hint()}"
        )
    found = [RunDir(each) for each in ([path] if is_run(path) else array_of(path))]
    if not found:
        raise RunDirError(
            f"{path} is not a run directory: it has no config.yaml and no attempts; `gpt2hpc status` lists runs{unstarted.hint()}"
        )
    return found


def one(path: Path | None) -> RunDir:
    """The same, of which there must be one."""
    found = named(path)
    if len(found) > 1:
        raise UsageError(f"{path} holds the {len(found)} runs of an array; name one of them, as {found[0].path}")
    return found[0]
