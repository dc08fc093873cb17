"""How far a directory is that many tasks prepare, from the records of the units that are done: no task reports to anybody."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc.data import encode, manifest, plan

_RECENT_S = 600.0


@dataclass(frozen=True)
class Survey:
    """Counts of a prepared or half-prepared directory; the rate is that of the last ten minutes."""

    data: str
    state: str
    units_done: int
    units: int
    tokens: int
    tokens_per_s: float | None
    eta_s: float | None
    last_unit_s_ago: float | None


def is_prepared(directory: Path) -> bool:
    return (directory / plan.NAME).is_file()


def survey(directory: Path, *, now: float | None = None) -> Survey:
    """Raises DataError where the plan is damaged."""
    now = time.time() if now is None else now
    the_plan = plan.load(directory)
    tokens = size = 0
    ended: list[tuple[float, int, int]] = []
    for unit in the_plan.units:
        record = encode.done(directory, the_plan, unit)
        if record is not None:
            made = sum(shard.tokens for shard in record.shards)
            tokens, size = tokens + made, size + unit.bytes
            ended.append((encode.record_path(directory, unit).stat().st_mtime, made, unit.bytes))
    ended.sort()
    recent = [each for each in ended if each[0] > now - _RECENT_S]
    rate = eta_s = None
    if len(recent) > 1 and recent[-1][0] > recent[0][0]:
        span_s = recent[-1][0] - recent[0][0]
        rate = sum(made for _, made, _ in recent[1:]) / span_s
        eta_s = (the_plan.bytes - size) * span_s / max(1, sum(text for _, _, text in recent[1:]))
    complete = (directory / manifest.NAME).is_file()
    return Survey(
        data=directory.resolve().name,
        state="prepared" if complete else "preparing" if recent else "unfinished",
        units_done=len(ended),
        units=len(the_plan.units),
        tokens=tokens,
        tokens_per_s=None if complete else rate,
        eta_s=None if complete else eta_s,
        last_unit_s_ago=now - ended[-1][0] if ended else None,
    )
