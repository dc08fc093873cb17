"""How fast a run goes, when it will be finished, and how many jobs that takes: from its log and its time limit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

RECENT_STEPS = 100
"""Logged steps that rates are told from."""


@dataclass(frozen=True)
class Logged:
    """What metrics.jsonl tells: the last losses in nats, recent rates, and `times`, (step, Unix time) of each logged step."""

    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    step_ms: float | None = None
    times: Sequence[tuple[int, float]] = ()

    def step_s(self, starts: Sequence[float]) -> float | None:
        """Of recent steps by the clock, with what saves and validations take, but without the `starts` (Unix times) between them."""
        took = steps = 0.0
        for (step, at), (next_step, next_at) in itertools.pairwise(self.times[-RECENT_STEPS:]):
            if next_step > step and next_at >= at and not any(at < start <= next_at for start in starts):
                took, steps = took + next_at - at, steps + next_step - step
        if not steps:
            return None if self.step_ms is None else self.step_ms / 1e3
        return took / steps

    def started_up_s(self, since: float, first_step: int, step_s: float) -> float | None:
        """Seconds from `since` until the step after `first_step` was begun; None where it is not logged."""
        after = next(((step, at) for step, at in self.times if step > first_step and at >= since), None)
        return None if after is None else max(0.0, after[1] - since - (after[0] - first_step) * step_s)


@dataclass(frozen=True)
class Outlook:
    """`eta_s` seconds of running until the end, start-ups included but no waiting in a queue; `jobs` further ones it takes."""

    eta_s: float
    jobs: int


def outlook(
    steps_left: int,
    step_s: float,
    *,
    left_s: float | None,
    limit_s: float | None,
    start_up_s: float,
    margin_s: float,
) -> Outlook | None:
    """What is left of a run whose jobs last `limit_s` (None for no limit) and save `margin_s` before their end.

    Args:
        left_s: Seconds until the limit of the job that runs; None if none does, math.inf for one without a limit.

    None where a job is over before it has taken a step.
    """
    work_s = max(0, steps_left) * step_s
    usable_s = 0.0 if left_s is None else max(0.0, left_s - margin_s)
    if steps_left <= 0 or work_s <= usable_s:
        return Outlook(work_s, 0)
    if limit_s is None:
        return Outlook(work_s + start_up_s, 1)
    each_s = limit_s - start_up_s - margin_s
    if each_s < step_s:
        return None
    jobs = math.ceil((work_s - usable_s) / each_s)
    return Outlook(work_s + jobs * start_up_s, jobs)


def read(path: Path) -> Logged:
    """All of that; of a file that did not change it is known still."""
    try:
        status = path.stat()
    except OSError:
        return Logged()
    return _read(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read(path: Path, size: int, changed_ns: int) -> Logged:
    steps: list[dict[str, Any]] = []
    last, val_loss = 0, None
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                facts = json.loads(line)
                last = max(last, facts["step"])  # a save is logged once it is done, some steps later
            except (ValueError, KeyError, TypeError):  # being written
                continue
            val_loss = facts.get("val_loss", val_loss)
            if "loss" in facts:
                steps.append(facts)
    recent = steps[-RECENT_STEPS:]
    times = [(facts["step"], facts["unix_s"]) for facts in steps if isinstance(facts.get("unix_s"), float | int)]
    return Logged(
        step=last,
        loss=steps[-1]["loss"] if steps else None,
        val_loss=val_loss,
        tokens_per_s=_mean(recent, "tokens_per_s"),
        mfu=_mean(recent, "mfu"),
        step_ms=_mean(recent, "ms"),
        times=times,
    )


def _mean(records: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [facts[key] for facts in records if isinstance(facts.get(key), float | int)]
    return fmean(values) if values else None
