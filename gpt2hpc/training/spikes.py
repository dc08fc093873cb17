"""Losses that leave the band of those before them."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from statistics import fmean

WINDOW = 100
"""Logged losses that the band is made of."""
LEAST = 20
"""Of them, below which there is no band yet: the first losses fall too fast."""
DEVIATIONS = 4.0


class Spikes:
    """Tells a spike from the losses before it alone, so that a resumed run that is given them tells the same ones.

    Args:
        before: The losses so far, of which the last WINDOW count.
    """

    def __init__(self, before: Iterable[float] = ()) -> None:
        self._last = collections.deque((loss for loss in before if math.isfinite(loss)), maxlen=WINDOW)

    def sees(self, loss: float) -> bool:
        """Whether this next loss is above the mean of the last ones by more than DEVIATIONS of their standard deviations.

        It is one of the last ones from then on. One that is not finite is neither: it ends the run.
        """
        if not math.isfinite(loss):
            return False
        spike = False
        if len(self._last) >= LEAST:
            mean = fmean(self._last)
            deviation = math.sqrt(fmean((last - mean) ** 2 for last in self._last))
            spike = loss > mean + DEVIATIONS * deviation
        self._last.append(loss)
        return spike
