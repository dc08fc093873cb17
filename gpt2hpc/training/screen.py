"""What rank 0 shows of a training: a live view on a terminal, lines in a log, warnings alone where it is told to be quiet."""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from gpt2hpc import cli
from gpt2hpc.training.metrics import StepRecord

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

DRAW_EVERY_S = 0.2
RATE_STEPS = 20
"""Logged steps that the time left is told from."""
CURVE_WIDTH = 60
_BARS = "▁▂▃▄▅▆▇█"
_WARNINGS = ("warning:", "skipping ")


class Screen:
    """A line for each step and for whatever else is said."""

    def say(self, text: str) -> None:
        cli.say(text)

    def show(self, record: StepRecord, steps: int) -> None:
        """A step is done, of `steps`."""
        self.say(record.line(steps))

    def close(self) -> None:
        """What is said from now on is said as lines."""


class Quiet(Screen):
    """Warnings alone."""

    def say(self, text: str) -> None:
        if text.startswith(_WARNINGS):
            cli.say(text)


class Silent(Screen):
    """Of ranks other than 0."""

    def say(self, text: str) -> None:
        """Nothing."""


class LiveView(Screen):
    """The newest step in place of the one before, and the curve of the losses; what is said stands above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._curve = Curve(CURVE_WIDTH)
        self._ms: collections.deque[float] = collections.deque(maxlen=RATE_STEPS)
        self._drawn = -math.inf
        # Drawn between steps, by this thread: one that draws all the time would take the interpreter from the steps.
        self._live: Live | None = Live(console=Console(highlight=False), auto_refresh=False)
        self._live.start()
        self._live.console.show_cursor(True)  # after a kill -9 nobody would

    def show(self, record: StepRecord, steps: int) -> None:
        self._curve.add(record.loss)
        self._ms.append(record.ms)
        now = time.monotonic()
        if self._live is None or (now - self._drawn < DRAW_EVERY_S and record.step != steps):
            return
        self._drawn = now
        try:
            self._live.update(self._view(record, steps), refresh=True)
        except OSError:  # the terminal was closed, which is no reason to end a training
            self.close()

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    def _view(self, record: StepRecord, steps: int) -> Text:
        """Lines, the last one empty, where whatever another process says may begin."""
        from rich.text import Text

        left = cli.duration((steps - record.step) * fmean(self._ms) / 1e3)
        mfu = f"   mfu {record.mfu:.1%}" if record.mfu is not None else ""
        view = Text(no_wrap=True, overflow="crop")
        view.append(f"step {record.step:,}/{steps:,}", "bold")
        view.append(f"   {record.step / steps:.1%}   ETA {left}\n")
        view.append(f"loss {record.loss:.4f}", "bold red" if record.spike else "bold green")
        view.append(f"   lr {record.lr:.2e}   norm {record.grad_norm:.3f}   {record.memory_gib:.1f} GiB\n")
        view.append(
            f"{record.tokens_per_s:,.0f} tok/s{mfu}   {record.ms:,.1f} ms, for data {record.data_wait_ms:,.1f}\n"
        )
        view.append(f"{self._curve}\n", "cyan")
        return view


class Curve:
    """Losses from first to last in at most `width` bars, each the mean of as many of them."""

    def __init__(self, width: int) -> None:
        self._width, self._each = width, 1
        self._means: list[float] = []
        self._rest: list[float] = []

    def add(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self._rest.append(loss)
        if len(self._rest) < self._each:
            return
        self._means.append(fmean(self._rest))
        self._rest = []
        if len(self._means) == 2 * self._width:
            self._means = [fmean(pair) for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    def __str__(self) -> str:
        means = self._means
        if len(means) > self._width:  # bars of two until there are enough for twice as wide ones
            means = [fmean(means[at : at + 2]) for at in range(0, len(means), 2)]
        return _bars(means)


def _bars(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    steps = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join(_BARS[round((value - low) * steps)] for value in values)


def chosen(environ: Mapping[str, str], *, is_first: bool) -> Screen:
    """What suits this process and where its output goes."""
    if not is_first:
        return Silent()
    if cli.is_quiet():
        return Quiet()
    draws = cli.is_on_terminal(environ) and "utf" in sys.stdout.encoding.lower()  # else it could not write the bars
    return LiveView() if draws else Screen()
