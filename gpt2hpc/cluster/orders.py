"""What Slurm is told to do with jobs: cancel them, release them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from gpt2hpc.cluster.queries import PATIENCE_S
from gpt2hpc.errors import MissingError


def cancel(numbers: Sequence[str], *, if_pending: bool = False) -> None:
    """`scancel`; with `if_pending` only those that have not started by then. MissingError, in Slurm's words, where it refuses."""
    _tell("scancel", *(["--state=PENDING"] if if_pending else []), *numbers)


def release(number: str) -> None:
    """`scontrol release` of a job that is held."""
    _tell("scontrol", "release", number)


def _tell(program: str, *arguments: str) -> None:
    path = shutil.which(program)
    if path is None:
        raise MissingError(f"{program} is not on PATH, so this machine cannot speak to Slurm; use a login node")
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise MissingError(f"Slurm does not answer within {PATIENCE_S:g} s; try again later") from None
    if done.returncode != 0:
        raise MissingError(f"{program} {' '.join(arguments)}: {' '.join((done.stderr or done.stdout).split())}")
