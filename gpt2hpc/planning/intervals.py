"""How often to save: what saves cost against what failures lose.

Young 1974, "A first order approximation to the optimum checkpoint interval" (doi:10.1145/361147.361115); Daly 2006, "A higher
order estimate of the optimum checkpoint interval for restart dumps" (doi:10.1016/j.future.2004.11.016). Failures are
exponential. A save here costs the steps only its stall; it counts, for a restart, only once it is written, `lag_s` later. The
next one waits for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Losses:
    """What a run loses besides its work.

    Args:
        stall_s: That the steps wait for a save, if none is under way.
        lag_s: From then until it is on disk, beside the steps.
        restart_s: From a failure to the first step after it.
        mtbf_s: Mean time between failures of the whole job.
    """

    stall_s: float
    lag_s: float
    restart_s: float
    mtbf_s: float

    def young_s(self) -> float:
        """√(2δM), formula (7)."""
        return math.sqrt(2 * self.stall_s * self.mtbf_s)

    def daly_s(self) -> float:
        """Daly's equation 37: √(2δM)·[1 + ⅓·√(δ/2M) + ⅑·δ/2M] − δ, or M where a save takes longer than 2M; formula (8)."""
        ratio = self.stall_s / (2 * self.mtbf_s)
        if ratio >= 1:
            return self.mtbf_s
        return self.young_s() * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.stall_s

    def best_s(self) -> float:
        """Daly's interval; not shorter than a save takes, since the next one would wait for it."""
        return max(self.daly_s(), self.stall_s + self.lag_s)

    def waited_s(self, interval_s: float) -> float:
        """That the steps wait for a save every `interval_s`: the stall, and until the save before is on disk."""
        return max(self.stall_s, self.stall_s + self.lag_s - interval_s)

    def expected_s(self, work_s: float, interval_s: float) -> float:
        """Wall time of `work_s` of computing: Daly's complete model, M·e^(R/M)·(e^((τ+δ)/M) − 1)·W/τ, δ what is waited; formula (9).

        A failure before a save is on disk loses one interval more: lag/(τ+δ) of the failures, τ each, so R has the lag in it.
        """
        failing = (self.restart_s + self.lag_s) / self.mtbf_s
        segment = (interval_s + self.waited_s(interval_s)) / self.mtbf_s
        if failing + segment > 700:  # past what a float can hold
            return math.inf
        return self.mtbf_s * math.exp(failing) * math.expm1(segment) * work_s / interval_s

    def overhead(self, interval_s: float) -> float:
        """Wall time lost as a share of the work."""
        return self.expected_s(1.0, interval_s) - 1.0
