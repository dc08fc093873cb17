"""What Slurm is told to do with jobs: cancel them, release them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from gpt2hpc.cluster.queries import PATIENCE_S
from gpt2hpc.errors import MissingError

ENDED = ("Invalid job id", "already completing or completed")
"""Slurm's words for a job that it has forgotten, and for one that is over."""


def cancel(numbers: Sequence[str], *, if_pending: bool = False) -> None:
    """`scancel`; with `if_pending` only those that have not started by then; one that is over meanwhile is as good as cancelled.
    MissingError, in Slurm's words, where it refuses."""
    said = _told("scancel", *(["--state=PENDING"] if if_pending else []), *numbers)
    if said is not None and not only_of_ended(said):
        raise MissingError(f"scancel {' '.join(numbers)}: {' '.join(said.split())}")


def only_of_ended(said: str) -> bool:
    """Whether scancel has failed for nothing but jobs that are over."""
    lines = [line for line in said.splitlines() if line.strip()]
    return bool(lines) and all(any(words in line for words in ENDED) for line in lines)


def release(number: str) -> None:
    """`scontrol release` of a job that is held."""
    said = _told("scontrol", "release", number)
    if said is not None:
        raise MissingError(f"scontrol release {number}: {' '.join(said.split())}")


def _told(program: str, *arguments: str) -> str | None:
    """What the program says where it fails; None where it does as it is told."""
    path = shutil.which(program)
    if path is None:
        raise MissingError(f"{program} is not on PATH, so this machine cannot speak to Slurm; use a login node")
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise MissingError(f"Slurm does not answer within {PATIENCE_S:g} s; try again later") from None
    return None if done.returncode == 0 else done.stderr or done.stdout or f"exit code {done.returncode}"
