"""What a run reports: `log.txt` (`step kind value`), `metrics.jsonl` and lines on the terminal; each step exactly once.

Only rank 0 writes, and only while no newer attempt exists. On resume both files are cut back to the resumed step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from gpt2hpc import durable
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.checkpoint import METRICS
from gpt2hpc.training.spikes import Spikes
from gpt2hpc.training.writers import Writer

_KINDS = (("train", "loss"), ("val", "val_loss"), ("hella", "hellaswag_acc_norm"), ("save", "save_s"))
"""The word in log.txt, and the key in metrics.jsonl of the same value."""
_SECONDS = (("val", "val_s"), ("hella", "hellaswag_s"), ("save", "save_s"))
"""What the clock calls it, and the key of how long it took."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; `step` counts finished ones, `loss` is the mean over its tokens in nats.

    `data_wait_ms` and `memory_gib` are rank 0's: what a step waited for tokens, and the most memory so far.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    ms: float
    tokens_per_s: float
    mfu: float | None
    data_wait_ms: float
    memory_gib: float
    spike: bool | None = None

    def line(self, steps: int) -> str:
        mfu = f"  mfu {self.mfu:5.1%}" if self.mfu is not None else ""
        return (
            f"step {self.step:{len(str(steps))}}/{steps}  loss {self.loss:7.4f}  lr {self.lr:.2e}  norm {self.grad_norm:6.3f}  "
            f"{self.ms:7.1f} ms  {self.tokens_per_s:9,.0f} tok/s{mfu}{'  spike' if self.spike else ''}"
        )


class MetricsLog:
    """The two files of a run, open for one attempt; with `run` None it swallows everything (ranks other than 0)."""

    def __init__(
        self,
        run: RunDir | None,
        *,
        resumed_step: int,
        fence: Callable[[], None],
        say: Callable[[str], None],
        show: Callable[[StepRecord, int], None] | None = None,
    ) -> None:
        self._fence, self._say = fence, say
        self._show = show or (lambda record, steps: say(record.line(steps)))
        self._files: tuple[TextIO, TextIO] | None = None
        self._run, self._path = run, run.metrics if run is not None else None
        self._known: set[tuple[str, int]] = set()
        self._writers: Sequence[Writer] = ()
        self._spikes = Spikes()
        if run is not None:
            fence()
            _cut(run.log, resumed_step, lambda line: int(line.split()[0]))
            fence()
            _cut(run.metrics, resumed_step, _step_of)
            for path in run.samples.glob("step*.txt"):
                digits = path.stem.removeprefix("step")
                if digits.isdecimal() and int(digits) > resumed_step:
                    path.unlink(missing_ok=True)
            rows = [line.split() for line in run.log.read_text().splitlines()]
            self._known = {(row[1], int(row[0])) for row in rows if row[1] in ("val", "hella")}
            self._spikes = Spikes(loss for _, loss in _logged(run.metrics, (("train", "loss"),)))
            self._files = run.log.open("a", encoding="utf-8"), run.metrics.open("a", encoding="utf-8")

    def copy_to(self, writers: Sequence[Writer]) -> None:
        """Give each line to these too; they have those that are there."""
        self._writers = writers

    def step(self, record: StepRecord, steps: int) -> None:
        record = dataclasses.replace(record, spike=self._spikes.sees(record.loss) or None)
        facts = {key: value for key, value in vars(record).items() if value is not None}
        self._write(f"{record.step} train {record.loss:.6f}", facts)
        self._show(record, steps)

    def validation(self, step: int, loss: float, tokens: int, *, seconds: float) -> None:
        """`loss` in nats over `tokens` tokens."""
        self._known.add(("val", step))
        self._write(f"{step} val {loss:.6f}", {"step": step, "val_loss": loss, "val_tokens": tokens, "val_s": seconds})
        self._say(f"step {step}  validation loss {loss:.4f} over {tokens:,} tokens")

    def hellaswag(self, step: int, *, acc: float, acc_norm: float, examples: int, seconds: float) -> None:
        """Shares of `examples` that were answered rightly."""
        self._known.add(("hella", step))
        facts = {"hellaswag_acc": acc, "hellaswag_acc_norm": acc_norm, "hellaswag_examples": examples}
        self._write(f"{step} hella {acc_norm:.6f}", {"step": step, **facts, "hellaswag_s": seconds})
        self._say(f"step {step}  HellaSwag acc_norm {acc_norm:.2%}, acc {acc:.2%} of {examples:,} examples")

    def save(self, step: int, *, seconds: float, stall_s: float, size: int) -> None:
        """A checkpoint of `size` bytes is there."""
        rate = size / max(seconds, 1e-9)
        facts = {"save_s": seconds, "save_stall_ms": stall_s * 1e3, "save_bytes": size, "save_bytes_per_s": rate}
        self._write(f"{step} save {seconds:.6f}", {"step": step, **facts})

    def sample(self, step: int, text: str) -> None:
        """What the model writes after that step, to `samples/`."""
        if self._run is None:
            return
        self._fence()
        self._run.samples.mkdir(exist_ok=True)
        durable.publish_text(self._run.sample(step), text)
        self._say(f"step {step}  {self._run.sample(step)}")

    def has(self, kind: str, step: int) -> bool:
        """Whether there is a validation (`val`), HellaSwag (`hella`) or a `sample` of that step, by whichever attempt; rank 0 knows."""
        if kind == "sample":
            return self._run is not None and self._run.sample(step).exists()
        return (kind, step) in self._known

    def took(self) -> Iterator[tuple[str, float]]:
        """What of the run so far took how many seconds, in its order: `save`, `val`, `hella`; rank 0 knows."""
        return iter(()) if self._path is None else _logged(self._path, _SECONDS)

    def put_on_disk(self, step: int) -> Callable[[], dict[str, bytes]]:
        """What a checkpoint of that step asks for, in another thread, before it is published: that what was written is on the
        disk, and the history that goes with it."""

        def put() -> dict[str, bytes]:
            for file in self._files or ():
                os.fsync(file.fileno())
            return {} if self._path is None else {METRICS: history(self._path, step)}

        return put

    def close(self) -> None:
        for file in self._files or ():
            file.close()
        for writer in self._writers:
            writer.end()

    def wait_for_writers(self) -> None:
        """After `close`: until what is copied has got there, or has not in time."""
        for writer in self._writers:
            writer.wait()

    def _write(self, line: str, facts: dict[str, float]) -> None:
        if self._files is None:
            return
        self._fence()
        log, metrics = self._files
        values = {key: value if math.isfinite(value) else None for key, value in facts.items()}  # JSON has no NaN
        values["unix_s"] = round(time.time(), 3)
        log.write(f"{line}\n")
        metrics.write(json.dumps(values, allow_nan=False) + "\n")
        log.flush()
        metrics.flush()
        for writer in self._writers:
            writer.add(values)


def history(path: Path, step: int) -> bytes:
    """The lines of a metrics.jsonl up to a step, for the checkpoint of that step."""
    return "".join(_kept(path, step, _step_of)).encode()


def restore(run: RunDir, saved: Path, step: int) -> None:
    """Make the history that came with a checkpoint the run's own, unless what is here goes on from it already.

    A run that resumes on an empty disk has none; one that had got less far than the Hub has one that lacks steps.
    """
    history = _kept(saved, step, _step_of)
    if not history or set(history) <= set(_kept(run.metrics, step, _step_of)):
        return
    lines = []
    for facts in map(json.loads, history):
        for word, key in _KINDS:
            if isinstance(facts.get(key), float):
                lines.append(f"{facts['step']} {word} {facts[key]:.6f}\n")
    durable.publish_text(run.log, "".join(lines))
    durable.publish_text(run.metrics, "".join(history))


def furthest(path: Path) -> int:
    """The last step of a metrics.jsonl; 0 where there is none."""
    return max(map(_step_of, _kept(path, sys.maxsize, _step_of)), default=0)


def _logged(path: Path, kinds: Sequence[tuple[str, str]]) -> Iterator[tuple[str, float]]:
    """The numbers by these keys in a metrics.jsonl, each with the key's word."""
    for facts in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        yield from ((word, facts[key]) for word, key in kinds if isinstance(facts.get(key), float))


def _step_of(line: str) -> int:
    """Of a line of metrics.jsonl."""
    return int(json.loads(line)["step"])


def _cut(path: Path, step: int, step_of: Callable[[str], int]) -> None:
    """Keep the lines up to `step`; a new file takes the name, so an older attempt writes into the old one."""
    durable.publish_text(path, "".join(_kept(path, step, step_of)) if step else "")


def _kept(path: Path, step: int, step_of: Callable[[str], int]) -> list[str]:
    """The lines up to `step`, without torn ones."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                keep = line.endswith("\n") and step_of(line) <= step
            except (ValueError, KeyError, IndexError, TypeError):
                keep = False
            if keep:
                kept.append(line)
    return kept
