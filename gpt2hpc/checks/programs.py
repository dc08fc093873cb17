"""Other programs and disks, asked with a time limit, so that none can hold up the doctor."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from gpt2hpc.cluster import signals

PATIENCE_S = 15.0
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a program said; `code` is None where it did not end in time."""

    code: int | None
    out: str
    err: str

    @property
    def words(self) -> str:
        """What it said of its failure, short, in a line."""
        said = self.err.strip() or self.out.strip()
        return " ".join(said.split())[-300:] or f"exit code {self.code}"


def ask(
    command: Sequence[str], *, patience_s: float = PATIENCE_S, env: Mapping[str, str] | None = None
) -> Answer | None:
    """The program's answer; None where it is not on PATH or cannot be started. What it has started itself ends with it."""
    path = shutil.which(command[0])
    if path is None:
        return None
    process = None
    try:
        with signals.held():
            process = subprocess.Popen(
                [path, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        out, err = process.communicate(timeout=patience_s)
    except OSError:
        return None
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        # Not waited for: it may hang in the kernel.
        if isinstance(why, KeyboardInterrupt):
            raise
        return Answer(None, "", f"no answer in {patience_s:g} s")
    return Answer(process.returncode, out, err)


def in_time(question: Callable[[], T]) -> T:
    """What a function answers or raises; TimeoutError where that takes too long, as of a disk that hangs."""
    answer: Future[T] = Future()

    def find() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # raised again below, in the thread that asks
            answer.set_exception(error)

    threading.Thread(target=find, daemon=True).start()
    return answer.result(PATIENCE_S)
