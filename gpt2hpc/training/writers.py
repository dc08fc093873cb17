"""What is logged, for TensorBoard and Weights & Biases: copies of metrics.jsonl, on rank 0 only, that never end a run.

Neither draws from a random generator of the training: TensorBoard's files are written here, record by record, and W&B's client
runs in a process of its own (`wandb_follower`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gpt2hpc import durable
from gpt2hpc.config import TrainConfig
from gpt2hpc.errors import MissingError
from gpt2hpc.run_dir import RunDir

Facts = Mapping[str, Any]
"""A line of metrics.jsonl."""
Say = Callable[[str], None]

END_S = 10.0
"""How long W&B's client may take to send the last lines."""
_NO_VALUES = ("step", "unix_s")
_GROUPS = ("val", "save", "hellaswag")


def check(train: TrainConfig) -> None:
    """Raise MissingError where what is to be written has no package to write it."""
    for name, wanted in (("tensorboard", train.tensorboard), ("wandb", train.wandb is not None)):
        spec = importlib.util.find_spec(name)
        if wanted and (spec is None or spec.origin is None):  # a directory by that name has none
            raise MissingError(
                f"train.{name}={getattr(train, name)} needs {name}, which is not installed: pip install 'gpt2hpc[{name}]'"
            )


def values(facts: Facts) -> dict[str, float]:
    """What is drawn of a line, by group and name: `loss` is `train/loss`, `val_loss` is `val/loss`."""
    found = {}
    for key, value in facts.items():
        if key not in _NO_VALUES and value is not None:
            group, _, rest = key.partition("_")
            found[f"{group}/{rest}" if rest and group in _GROUPS else f"train/{key}"] = float(value)
    return found


class Writer(Protocol):
    def add(self, facts: Facts) -> None:
        """Another line of metrics.jsonl, which is in the file already."""

    def end(self) -> None:
        """There will be no more lines. Does not wait."""

    def wait(self) -> None:
        """Wait for what is under way, but not for ever."""


def opened(run: RunDir, train: TrainConfig, say: Say) -> list[Writer]:
    """The writers that are wished for, with all that is in the run's metrics.jsonl."""
    writers: list[Writer] = []
    if train.tensorboard:
        writers.append(Careful("TensorBoard", lambda: TensorBoard(run.tensorboard, run.metrics), say))
    if train.wandb is not None:
        project = train.wandb
        writers.append(Careful("W&B", lambda: WandB(run, project), say))
    return writers


class Careful:
    """A writer that warns when it fails, once, and is not called again."""

    def __init__(self, name: str, begin: Callable[[], Writer], say: Say) -> None:
        self._name, self._say = name, say
        self._writer: Writer | None = None
        with self._careful():
            self._writer = begin()

    def add(self, facts: Facts) -> None:
        with self._careful():
            if self._writer is not None:
                self._writer.add(facts)

    def end(self) -> None:
        with self._careful():
            if self._writer is not None:
                self._writer.end()

    def wait(self) -> None:
        with self._careful():
            if self._writer is not None:
                self._writer.wait()

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library of others raises is no reason to end a training
            self._writer = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(
                f"warning: {self._name} gets no more values in this attempt: {reason}; metrics.jsonl has them all"
            )


class TensorBoard:
    """An event file with the whole history; those of earlier attempts are emptied, and with them steps that were done twice.

    Its first event tells a TensorBoard that is looking on to forget what it has read of those. One that reads a file which is
    gone would stay there, so an emptied one goes an attempt later.
    """

    def __init__(self, directory: Path, metrics: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(exist_ok=True)
        earlier = [path for path in directory.iterdir() if "tfevents" in path.name]
        contents, began = io.BytesIO(), time.time()
        records = RecordWriter(contents)
        records.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        start = SessionLog(status=SessionLog.START)
        records.write(Event(wall_time=began, step=0, session_log=start).SerializeToString())
        for line in metrics.read_text(encoding="utf-8").splitlines():
            records.write(_event(json.loads(line)))
        path = directory / f"events.out.tfevents.{_later(earlier, int(began))}.{socket.gethostname()}"
        durable.publish_bytes(path, contents.getvalue())
        for each in earlier:
            if each.stat().st_size:
                os.truncate(each, 0)
            else:
                each.unlink()
        self._file = path.open("ab")
        self._records = RecordWriter(self._file)

    def add(self, facts: Facts) -> None:
        self._records.write(_event(facts))
        self._file.flush()

    def end(self) -> None:
        self._file.close()

    def wait(self) -> None:
        """Nothing is under way."""


def _later(earlier: Sequence[Path], now_s: int) -> int:
    """A number that sorts behind those of the files there, whatever the clocks of their nodes said."""
    stamps = [path.name.partition("tfevents.")[2].partition(".")[0] for path in earlier]
    return max([now_s, *(int(stamp) + 1 for stamp in stamps if stamp.isdigit())])


def _event(facts: Facts) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values(facts).items()])
    event = Event(wall_time=facts.get("unix_s") or time.time(), step=facts["step"], summary=summary)
    encoded: bytes = event.SerializeToString()
    return encoded


class WandB:
    """The process that follows metrics.jsonl, with which it shares nothing but a pipe whose end is the end of the attempt.

    What it says of its own accord is in RUN/wandb/follower.log.
    """

    def __init__(self, run: RunDir, project: str) -> None:
        run.wandb.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "gpt2hpc.training.wandb_follower", str(run.path), project]
        self._log = run.wandb / "follower.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True)

    def add(self, facts: Facts) -> None:
        """It reads the file; here it is only looked whether it lives."""
        if self._process.poll() is not None:
            raise ChildProcessError(f"its process ended with exit code {self._process.returncode}; see {self._log}")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        if code:
            raise ChildProcessError(f"its process ended with exit code {code}; see {self._log}")
