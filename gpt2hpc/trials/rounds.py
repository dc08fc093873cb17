"""All trials, each in a process of its own: one that crashes or hangs takes no other with it. The longest goes on beside the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc.cluster import signals
from gpt2hpc.finding import State, Timed
from gpt2hpc.trials.bench import Bench

MARK = "gpt2hpc-trial:"
PATIENCE_S = 600.0
"""For each; a first import of torch from a busy shared disk takes a minute."""
OF_OTHER_JOBS = ("GPT2HPC_", "SLURM_", "TORCHELASTIC_", "MASTER_")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
CACHES = (
    *("CUDA_CACHE_PATH", "HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"),
    "TMPDIR",
)


@dataclass(frozen=True)
class Trial:
    """Something to be tried.

    Args:
        name: As it is printed.
        module: Of this package; its `run` returns what is to be said, or raises.
        mend: What to do where it fails and does not say so itself.
        beside: Whether it goes on beside the others: it takes long, and one core.
    """

    name: str
    module: str
    mend: str
    beside: bool = False


TRIALS = (
    Trial(
        "imports",
        "imports",
        "pip install --upgrade 'gpt2hpc[train]', and look what else is on Python's path: gpt2hpc doctor",
    ),
    Trial("tokenizer", "tokens", "reinstall gpt2hpc and tiktoken"),
    Trial(
        "forward and backward",
        "step",
        "install torch again, in a build that fits this machine: gpt2hpc doctor tells which",
    ),
    Trial("all-reduce", "allreduce", "see docs/slurm.md, Network; gpt2hpc doctor looks at interfaces and libraries"),
    Trial(
        "save and resume", "resume", "do not train with this installation; run it again on another node, then report it"
    ),
    Trial(
        "compiled step",
        "compiled",
        "torch.compile wants g++ (and gcc with Python's headers for a GPU), and a TMPDIR whose files may be executed; or train with "
        "--train.compile false",
        beside=True,
    ),
)


def made(bench: Bench, env: Mapping[str, str], trials: Iterable[Trial] = TRIALS) -> Iterator[Timed]:
    """What each came to, as soon as it is known."""
    trials = tuple(trials)
    with contextlib.ExitStack() as others:
        begun = {trial: others.enter_context(_begun(trial, bench, env)) for trial in trials if trial.beside}
        for trial in trials:
            with contextlib.nullcontext(begun[trial]) if trial.beside else _begun(trial, bench, env) as outcome:
                result = outcome()
            yield result


def surroundings(env: Mapping[str, str], folder: Path, bench: Bench) -> dict[str, str]:
    """The caller's environment without the job or rank that the caller may be; all that is cached goes to the folder."""
    kept = {name: value for name, value in env.items() if not name.startswith(OF_OTHER_JOBS) and name not in OF_A_RANK}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if bench.device == "cpu" else {}
    caches = dict.fromkeys(CACHES, str(folder))
    return {**kept, **hidden, **caches, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def _begun(trial: Trial, bench: Bench, env: Mapping[str, str]) -> Iterator[Callable[[], Timed]]:
    """A trial's process, of which nothing stays behind; what is given waits for what it comes to."""
    folder, began = bench.folder / trial.module, time.monotonic()
    folder.mkdir()
    process: subprocess.Popen[str] | None = None

    def outcome() -> Timed:
        assert process is not None
        try:
            said, _ = process.communicate(timeout=PATIENCE_S)
            state, text = _verdict(said, process.returncode)
        except subprocess.TimeoutExpired:
            state, text = "FAIL", f"it did not end in {PATIENCE_S:g} s"
        if state == "FAIL":
            text = f"{text}; {trial.mend}"
        return Timed(trial.name, state, text, round(time.monotonic() - began, 2))

    try:
        with signals.held():
            process = subprocess.Popen(
                [sys.executable, "-m", "gpt2hpc.trials", trial.module, bench.device, str(folder), str(bench.gpus)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=surroundings(env, folder, bench),
                start_new_session=True,  # Ctrl-C ends the trial by way of this process, once
            )
        yield outcome
    finally:
        if process is not None:
            _end(process)


def _verdict(said: str, code: int) -> tuple[State, str]:
    """What the process has printed last of all; one that crashed has not."""
    for line in reversed(said.splitlines()):
        if line.startswith(MARK):
            told = json.loads(line.removeprefix(MARK))
            return told["state"], told["text"]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    return "FAIL", f"its process {how}" + (f": {last[-300:]}" if last else "")


def _end(process: subprocess.Popen[str]) -> None:
    """End it where it still runs: twice as by Ctrl-C, by which it ends ranks that it has started, and then for good. Nothing of its
    session stays, such as what torch.compile has started."""
    try:
        for number, wait_s in ((signal.SIGINT, 2.0), (signal.SIGINT, 10.0)):
            if process.poll() is not None:
                return
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=wait_s)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
