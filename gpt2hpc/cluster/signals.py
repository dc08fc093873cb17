"""Reasons to stop, and the signals that are some of them. Torch-free, so that a rank listens before it imports torch."""

from __future__ import annotations

import contextlib
import enum
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from gpt2hpc.cluster.ledger import Cause

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Told(KeyboardInterrupt):
    """TERM or HUP has reached this process: as Ctrl-C, but perhaps none of those that it has started."""


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """TERM and HUP end a verb by the exception Told, so that it cleans up; a second one changes nothing. In the main thread."""
    told = False

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise Told

    asked = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, tell) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Ctrl-C, TERM and HUP wait until it ends: an exception while a process is being started would leave that running, unknown to
    whoever wanted to end it."""
    if threading.current_thread() is not threading.main_thread():  # which is the one that they reach
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handled:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


class Stop(enum.IntEnum):
    """Reasons to stop; where ranks differ, the largest wins."""

    NO = 0
    TIME_LIMIT = 1
    PREEMPTED = 2
    STOPPED = 3
    DIVERGED = 4

    @property
    def cause(self) -> Cause:
        return Cause[self.name]


class SignalFlag:
    """Remembers the signals of a preemption or a cancel; a second one changes nothing."""

    def __init__(self) -> None:
        self.stop = Stop.NO

    def install(self) -> None:
        """Take over TERM, USR1, USR2 and INT from whoever had them; only in the main thread.

        The launcher starts a rank with them blocked, so that none can end it before it listens.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        wish = Stop.STOPPED if number == signal.SIGINT else Stop.PREEMPTED
        self.stop = max(self.stop, wish)
