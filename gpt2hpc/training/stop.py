"""When to save and when to stop: every rank notices things, and all agree on the step.

A signal only sets a flag. At each step the ranks start a MAX all-reduce of what they noticed and read it at the next
step, so agreement costs no waiting; a peer's death makes the read raise, and nobody saves.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2hpc.cluster.signals import Stop
from gpt2hpc.config import CheckpointConfig
from gpt2hpc.training.checkpoint import ASSUMED_BYTES_PER_S

LAST = 3
"""Of saves, and of evaluations of a kind: the longest of them is what the next one may take. More would keep for ever in mind what
a disk that hung, or a job that was suspended, drew out once."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks do after the step: nothing, save, stop (which saves, unless diverged), or end since a save has failed."""

    stop: Stop = Stop.NO
    save: bool = False
    failed: bool = False


class Clock:
    """Time since the last save, and time left: rank 0's watch decides for all."""

    def __init__(self, config: CheckpointConfig, job_end: float | None, *, state_bytes: int = 0) -> None:
        self._config, self._job_end = config, job_end
        self._saved_at, self._asked = time.monotonic(), False
        self._assumed_save_s = state_bytes / ASSUMED_BYTES_PER_S  # until one is measured
        self._took: dict[str, deque[float]] = {}

    def begins_to_save(self) -> None:
        """The next interval counts from here."""
        self._saved_at, self._asked = time.monotonic(), False

    def took(self, work: str, seconds: float) -> None:
        """How long a `save` took, from its beginning until it was there, or an evaluation of a kind; now or in an earlier attempt."""
        self._took.setdefault(work, deque(maxlen=LAST)).append(seconds)

    def asks_to_save(self) -> bool:
        """True once when a save is due, then False until it happened."""
        if self._asked or time.monotonic() - self._saved_at < 60 * self._config.every_minutes:
            return False
        self._asked = True
        return True

    def is_end_near(self, step_s: float, *, is_saving: bool) -> bool:
        """Whether what is left of the job is less than agreeing on a step, the evaluations, the saves and the margin take."""
        if self._job_end is None:
            return False
        saves = 1.5 + is_saving  # the last one waits for the one under way
        longest = {work: max(seconds) for work, seconds in self._took.items()}
        save_s = longest.pop("save", self._assumed_save_s)
        needed_s = 3 * step_s + sum(longest.values()) + saves * save_s + self._config.stop_margin_s
        return self._job_end - time.time() < needed_s


class StopFile:
    """A user's `touch STOP`, looked for once a second at most (a metadata call on a shared file system)."""

    def __init__(self, path: Path) -> None:
        self._path, self._looked_at, self._seen = path, 0.0, False

    def is_there(self) -> bool:
        if not self._seen and time.monotonic() - self._looked_at > 1:
            self._looked_at = time.monotonic()
            self._seen = self._path.exists()
        return self._seen


class Consensus:
    """The running all-reduce: `exchange` hands in this step's wish and returns what was agreed on the step before."""

    def __init__(self) -> None:
        self._running: tuple[dist.Work | None, torch.Tensor] | None = None

    def exchange(self, stop: Stop, *, save: bool, failed: bool) -> Agreement:
        """Raises the backend's error if a peer is gone."""
        agreed = self.settle()
        wish = torch.tensor([stop, save, failed], dtype=torch.int32)
        self._running = dist.all_reduce(wish, op=dist.ReduceOp.MAX, async_op=True), wish
        return agreed

    def settle(self) -> Agreement:
        """Wait for the exchange under way, if any."""
        if self._running is None:
            return Agreement()
        work, wish = self._running
        self._running = None
        if work is not None:
            work.wait()
        stop, save, failed = wish.tolist()
        return Agreement(Stop(stop), bool(save), bool(failed))
