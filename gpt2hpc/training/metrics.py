"""What a run reports: `log.txt` (`step kind value`), `metrics.jsonl` and lines on the terminal; each step exactly once.

Only rank 0 writes, and only while no newer attempt exists. On resume both files are cut back to the resumed step.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from gpt2hpc import durable
from gpt2hpc.run_dir import RunDir


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; `step` counts finished ones, `loss` is the mean over its tokens in nats."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    ms: float
    tokens_per_s: float
    mfu: float | None

    def line(self, steps: int) -> str:
        mfu = f"  mfu {self.mfu:5.1%}" if self.mfu is not None else ""
        return (
            f"step {self.step:{len(str(steps))}}/{steps}  loss {self.loss:7.4f}  lr {self.lr:.2e}  norm {self.grad_norm:6.3f}  "
            f"{self.ms:7.1f} ms  {self.tokens_per_s:9,.0f} tok/s{mfu}"
        )


class MetricsLog:
    """The two files of a run, open for one attempt; with `run` None it swallows everything (ranks other than 0)."""

    def __init__(
        self, run: RunDir | None, *, resumed_step: int, fence: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self._fence, self._say = fence, say
        self._files: tuple[TextIO, TextIO] | None = None
        self._validated: set[int] = set()
        if run is not None:
            fence()
            _cut(run.log, resumed_step, lambda line: int(line.split()[0]))
            fence()
            _cut(run.metrics, resumed_step, lambda line: int(json.loads(line)["step"]))
            self._validated = {int(line.split()[0]) for line in run.log.read_text().splitlines() if " val " in line}
            self._files = run.log.open("a", encoding="utf-8"), run.metrics.open("a", encoding="utf-8")

    def step(self, record: StepRecord, steps: int) -> None:
        facts = {key: value for key, value in vars(record).items() if value is not None}
        self._write(f"{record.step} train {record.loss:.6f}", facts)
        self._say(record.line(steps))

    def validation(self, step: int, loss: float, tokens: int) -> None:
        """`loss` in nats over `tokens` tokens."""
        self._validated.add(step)
        self._write(f"{step} val {loss:.6f}", {"step": step, "val_loss": loss, "val_tokens": tokens})
        self._say(f"step {step}  validation loss {loss:.4f} over {tokens:,} tokens")

    def has_validation(self, step: int) -> bool:
        """Whether that step was validated, by an earlier attempt or by this one; rank 0 knows."""
        return step in self._validated

    def sync(self) -> None:
        """Put what was written on the disk, before a checkpoint that counts on it."""
        for file in self._files or ():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files or ():
            file.close()

    def _write(self, line: str, facts: dict[str, float]) -> None:
        if self._files is None:
            return
        self._fence()
        log, metrics = self._files
        values = {key: value if math.isfinite(value) else None for key, value in facts.items()}  # JSON has no NaN
        log.write(f"{line}\n")
        metrics.write(json.dumps(values, allow_nan=False) + "\n")
        log.flush()
        metrics.flush()


def _cut(path: Path, step: int, step_of: Callable[[str], int]) -> None:
    """Keep the lines up to `step`; torn ones go. A new file takes the name, so an older attempt writes into the old one."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                keep = line.endswith("\n") and step_of(line) <= step
            except (ValueError, KeyError, IndexError, TypeError):
                keep = False
            if keep:
                kept.append(line)
    durable.publish_text(path, "".join(kept) if step else "")
