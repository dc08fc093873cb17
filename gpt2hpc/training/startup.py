"""How long a rank takes from its process to the end of its first step, by phase; and was the compiler's cache warm?"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FIRST_STEP = "first step"
SHOWN_S = 0.05
"""A phase that took less is not worth a word."""


class StartUp:
    """Seconds of each phase, to the millisecond, in the order in which they ended; one that comes twice is added up.

    The first phase begins with the process, before any import; where there is no /proc, with this object.
    """

    def __init__(self) -> None:
        self._mark = process_began_s()
        self._phases: dict[str, float] = {}

    @property
    def phases(self) -> Mapping[str, float]:
        return {phase: round(seconds, 3) for phase, seconds in self._phases.items()}

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def done(self, phase: str) -> None:
        """What came since the phase before was this one."""
        now = _now_s()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._mark
        self._mark = now

    def line(self, cache: CompileCache | None) -> str:
        """All of it, for the log."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items() if seconds >= SHOWN_S)
        told = f"; compile cache {cache}" if cache else ""
        return f"start-up: {self.seconds:.1f} s until the first step was done: {parts}{told}"


@dataclass(frozen=True)
class CompileCache:
    """How many graphs of this process torch.compile found compiled by an earlier one, and how many it did not."""

    hits: int
    misses: int

    @property
    def state(self) -> str:
        if not self.hits:
            return "cold"
        return "warm" if not self.misses else "partly warm"

    def __str__(self) -> str:
        return f"{self.state} ({self.hits} of {self.hits + self.misses} graphs were there)"


def compile_cache() -> CompileCache | None:
    """Of this process so far; None where it has compiled nothing, or without a cache."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # to import it would take seconds
    if dynamo is None:
        return None
    counted = dynamo.counters["inductor"]
    hits, misses = counted["fxgraph_cache_hit"], counted["fxgraph_cache_miss"]
    return CompileCache(hits, misses) if hits or misses else None


def process_began_s() -> float:
    """When this process was started, on the clock of `_now_s`; now, where the kernel does not tell."""
    now = _now_s()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return now
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return now
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime, in ticks since the boot
    return began if 0 < began <= now else now


def _now_s() -> float:
    """Seconds since the boot where that is known: the clock of /proc."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
