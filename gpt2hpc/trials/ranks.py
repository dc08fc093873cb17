"""Ranks of a trial: started as any training's on this machine, with what they print kept apart."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2hpc.cluster.launch import LocalJob, SignalRelay, run_attempt
from gpt2hpc.run_dir import RunDir
from gpt2hpc.trials.bench import Bench, TrialError

JOB = "selftest"
"""Of every start: the second one of a run is a restart of the first."""


def run_ranks(bench: Bench, run: RunDir, module: str, *arguments: str, nproc: int, gpus: int, restart: int = 0) -> None:
    """`python -m MODULE ARGUMENTS` as each rank; TrialError, with the last that was said, where one fails."""
    job = LocalJob((sys.executable, "-m", module, *arguments), run, nproc, JOB, gpus=gpus)
    said = bench.folder / f"said-{run.name}-{restart}.txt"
    with _printing_to(said), SignalRelay().installed() as relay:
        code = run_attempt(job, restart=restart, relay=relay)
    if code:
        raise TrialError(f"{nproc} processes ended with exit code {code}: {_last_words(said, run.rank_logs)}")


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """What this process and those that it starts print goes to that file."""
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with path.open("wb") as file:
            for number in kept:
                os.dup2(file.fileno(), number)
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _last_words(said: Path, logs: Path) -> str:
    """The error that a rank ended with, where it has named one, else the last line of all."""
    texts: Sequence[Path] = [said, *sorted(logs.rglob("*.log"))] if logs.is_dir() else [said]
    lines = [line.strip() for path in texts for line in path.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("gpt2hpc: error: ")]
    return (named or lines or ["nothing was said"])[-1].removeprefix("gpt2hpc: error: ")[-300:]
