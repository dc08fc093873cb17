"""How far a task is: a live bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from gpt2hpc import cli
from gpt2hpc.data.plan import Unit
from gpt2hpc.data.workers import Counts

LINE_EVERY_S = 10.0


class Meter:
    """Share, rate and time left of some units."""

    def __init__(self, units: Sequence[Unit]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._units, self._total = len(units), max(1, sum(unit.bytes for unit in units))
        self._started = self._said = time.monotonic()
        self._live = cli.is_on_terminal(os.environ)
        self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=Console())
        self._task = self._bar.add_task("", total=1.0)
        if self._live:
            self._bar.start()

    def show(self, counts: Counts) -> None:
        """Called several times a second."""
        text = self.line(counts)
        if self._live:
            self._bar.update(self._task, completed=self._share(counts), description=text)
        now = time.monotonic()
        if not self._live and now - self._said >= LINE_EVERY_S:
            self._said = now
            cli.say(text)

    def _share(self, counts: Counts) -> float:
        """By characters while units are at work, which are a little fewer than bytes."""
        return min(1.0, max(counts.bytes, min(counts.characters, 0.99 * self._total)) / self._total)

    def line(self, counts: Counts) -> str:
        seconds, share = max(time.monotonic() - self._started, 1e-9), self._share(counts)
        left = cli.duration(seconds * (1 - share) / share) if share else "?"
        return (
            f"{share:4.0%}  unit {counts.units}/{self._units}  {counts.tokens / 1e6:,.1f} Mtok  "
            f"{counts.tokens / seconds / 1e6:.2f} Mtok/s  ETA {left}"
        )

    def close(self, counts: Counts) -> None:
        if self._live:
            self._bar.stop()
        else:  # where even stopping the bar would leave control codes
            cli.say(self.line(counts))
