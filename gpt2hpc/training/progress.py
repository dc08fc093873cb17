"""How fast and how well each step went, read from the device a step late so that the host never waits for its queue."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2hpc.cluster import host_memory
from gpt2hpc.config import Config
from gpt2hpc.training import precision
from gpt2hpc.training.metrics import MetricsLog, StepRecord
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.schedule import learning_rate

Mark = torch.cuda.Event | float
"""A moment in the device's queue: an event on CUDA, seconds elsewhere."""


@dataclass(frozen=True)
class _Pending:
    step: int
    steps: int
    began: Mark
    ended: Mark
    waited_s: float
    values: Tensor


class Progress:
    """Turns device tensors into log lines."""

    def __init__(self, config: Config, ranks: Ranks, log: MetricsLog, *, step: int) -> None:
        self._config, self._ranks, self._log = config, ranks, log
        self._peak_flops = precision.peak_flops(ranks.device)
        self._pending: _Pending | None = None
        self._last: tuple[int, Mark] = (step, self._mark())
        self._waited_s = 0.0
        self._timed_from: tuple[int, float] | None = (
            None  # the first step waits for what comes only once, and does not count
        )
        self.step_s = 0.0
        """Seconds a step by this process's clock, since the last save or validation; 0 before there are two steps."""
        self.diverged = False

    def restart_clock(self, step: int) -> None:
        """Leave what happened since the last report (a save, a validation) out of the rates."""
        self._last = step, self._mark()
        self._waited_s = 0.0
        if self._timed_from is not None:
            self._timed_from = step, time.perf_counter()

    def waited(self, seconds: float) -> None:
        """The step that is being queued waited for its tokens."""
        self._waited_s += seconds

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """A step was queued: report the one before, then keep this one. `loss` is the rank's mean, `norm` is global."""
        self.flush()
        self._time(step)
        train = self._config.train
        if step % train.log_every and step != train.steps:
            return
        values = torch.stack([loss, norm])
        if self._ranks.world_size > 1:
            dist.all_reduce(values)
            values /= self._ranks.world_size
        host = values
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
        (before, began), ended = self._last, self._mark()
        self._pending = _Pending(step, step - before, began, ended, self._waited_s, host)
        self._last, self._waited_s = (step, ended), 0.0

    def _time(self, step: int) -> None:
        """Without asking the device: a host that is ahead of it is soon held up."""
        now = time.perf_counter()
        if self._timed_from is None:
            self._timed_from = step, now
        else:
            before, began = self._timed_from
            self.step_s = (now - began) / (step - before)

    def flush(self) -> None:
        """Report what is pending; waits for that step only, not for what was queued since."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step_s = _seconds(pending.began, pending.ended) / pending.steps
        loss, norm = pending.values.tolist()
        rate = self._config.train.tokens_per_step / step_s
        flops = rate * self._config.model.flops_per_token / self._ranks.world_size
        record = StepRecord(
            step=pending.step,
            loss=loss,
            lr=learning_rate(pending.step - 1, self._config),
            grad_norm=norm,
            ms=step_s * 1e3,
            tokens_per_s=rate,
            mfu=flops / self._peak_flops if self._peak_flops else None,
            data_wait_ms=pending.waited_s / pending.steps * 1e3,
            memory_gib=memory_gib(self._ranks.device),
        )
        self._log.step(record, self._config.train.steps)
        self.diverged |= not math.isfinite(loss)

    def _mark(self) -> Mark:
        if self._ranks.device.type != "cuda":
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def memory_gib(device: torch.device) -> float:
    """The most that this process has held so far: of the GPU by its tensors, elsewhere of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform.startswith("linux"):  # whose ru_maxrss begins with that of the process that started this one
        return host_memory.most_resident_bytes() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)


def _seconds(began: Mark, ended: Mark) -> float:
    if isinstance(began, float) or isinstance(ended, float):
        assert isinstance(began, float)
        assert isinstance(ended, float)
        return max(ended - began, 1e-9)
    ended.synchronize()
    return max(float(began.elapsed_time(ended)) / 1e3, 1e-9)
