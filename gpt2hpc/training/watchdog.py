"""Notices that a rank makes no progress any more, and ends it: nobody should pay for GPUs that wait for one that is stuck.

A thread compares how long ago the last sign of progress was with a limit. It counts only time in which it was itself awake, so
that a machine that sleeps, a job that is suspended and a node under heavy load are no hang. What a limit is follows from the run:
several times the longest that was seen of the same kind, and never less than some minutes. Torch-free, and it asks no device.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpt2hpc import cli
from gpt2hpc.config import Config
from gpt2hpc.errors import NodeError
from gpt2hpc.training.dumps import Dumps, Silence

STEP, PREFLIGHT = "step", "preflight"
"""The first is any training step but an attempt's first. The second is known to take seconds."""
POLL_S, GATHER_S = 5.0, 15.0
"""Between two looks; how long all ranks may take to dump, once one has."""


@dataclass(frozen=True)
class Limits:
    """How long may pass without a sign of progress.

    Args:
        least_s: In whatever was timed before, at least.
        factor: Times the longest of the same kind.
        phase_s: In what was not timed yet, and in what depends on disks and networks alone.
    """

    least_s: float
    factor: float
    phase_s: float

    def of(self, longest_s: float | None) -> float:
        """Seconds, where the longest so far took `longest_s`; None where there was none."""
        return self.phase_s if longest_s is None else max(self.least_s, self.factor * longest_s)


def limits(config: Config, *, waits_for_shards: bool) -> Limits | None:
    """Those of the settings; None where nobody shall watch. A step may wait for a shard as long as data.patience_s."""
    wished = config.requeue
    if wished.hang_minutes is None:
        return None
    least_s = 60 * wished.hang_minutes
    if waits_for_shards:
        least_s = max(least_s, config.data.patience_s + 60)
    return Limits(least_s, wished.hang_factor, max(least_s, 60 * wished.hang_phase_minutes))


class Watchdog:
    """Every rank has one, and tells it of its progress.

    Args:
        limits: None to watch nothing.
        dumps: Where ranks leave what they were doing, and how they agree on the end.
        end: Ends the process, whatever its threads are doing.
    """

    def __init__(self, limits: Limits | None, dumps: Dumps, end: Callable[[int], object] = os._exit) -> None:
        self._limits, self._dumps, self._end = limits, dumps, end
        self._poll_s = min(POLL_S, limits.least_s / 10) if limits else POLL_S
        self._awake_s = self._since_s = 0.0
        self._looked_at = time.monotonic()
        self._longest_s = {PREFLIGHT: 0.0}
        self._phase, self._phase_limit_s = STEP, None  # type: tuple[str, float | None]
        self._beats = 0
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """From here to the end of the block."""
        if self._limits is None:
            yield
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._looked_at = time.monotonic()
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(self._poll_s)

    def beat(self) -> None:
        """Something was done. Cheap enough for every micro batch."""
        if self._phase_limit_s is None:
            longest_s = self._longest_s.get(self._phase, 0.0)
            self._longest_s[self._phase] = max(longest_s, self._awake_s - self._since_s)
        self._mark()

    def _mark(self) -> None:
        self._since_s = self._awake_s
        self._beats += 1

    @contextlib.contextmanager
    def phase(self, name: str, *, limit_s: float | None = None) -> Iterator[None]:
        """A block that is no step. Its limit is learnt from the blocks of that name before; or it is `limit_s`, phase_s at least."""
        outer, outer_limit_s = self._phase, self._phase_limit_s
        self._mark()
        self._phase, self._phase_limit_s = name, limit_s
        try:
            yield
        finally:
            self.beat()
            self._phase, self._phase_limit_s = outer, outer_limit_s

    def _silence(self) -> Silence:
        assert self._limits is not None
        if self._phase_limit_s is not None:
            limit_s = max(self._phase_limit_s, self._limits.phase_s)
        else:
            limit_s = self._limits.of(self._longest_s.get(self._phase))
        return Silence(self._phase, self._awake_s - self._since_s, limit_s, self._beats)

    # In the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._limits is not None
        while self._sleep():
            silence = self._silence()
            is_over = silence.seconds > silence.limit_s
            # A peer's limit may be another: whoever is silent too joins in, so that all dumps are of one moment.
            if is_over or (silence.seconds > self._limits.least_s / 2 and self._dumps.are_begun()):
                self._sound(silence)

    def _sleep(self) -> bool:
        """Until the next look; False once nothing is to be watched any more."""
        if self._ended.wait(self._poll_s):
            return False
        now = time.monotonic()
        self._awake_s += min(now - self._looked_at, 2 * self._poll_s)
        self._looked_at = now
        return True

    def _sound(self, silence: Silence) -> None:
        """Dump, wait for the dumps of the others, have it told once, and end the process; or withdraw, if it goes on after all."""
        try:
            self._dumps.write(silence)
            until_s = self._awake_s + GATHER_S
            while self._awake_s < until_s and not self._dumps.are_complete():
                if not self._sleep() or self._beats != silence.beats:
                    self._dumps.withdraw()
                    return
            self._dumps.conclude(self._sleep)
        except OSError as error:  # of the disk: the end is what matters
            cli.warn(f"the stacks of a hung attempt could not be written: {error}")
        self._end(NodeError.exit_code)
