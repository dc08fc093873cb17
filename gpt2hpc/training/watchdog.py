"""Notices that a rank makes no progress any more, and ends it: nobody should pay for GPUs that wait for one that is stuck.

A thread compares how long ago the last sign of progress was with a limit. It counts only time in which it was itself awake, so
that a machine that sleeps, a job that is suspended and a node under heavy load are no hang. What a limit is follows from the run:
several times the longest that was seen of the same kind, and never less than some minutes. Torch-free, and it asks no device.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpt2hpc.config import Config
from gpt2hpc.errors import NodeError
from gpt2hpc.training.dumps import Dumps, Silence, complain

STEP, PREFLIGHT = "step", "preflight"
"""The second is known to take seconds."""
POLL_S, GATHER_S = 5.0, 75.0
"""Between two looks; how long all ranks may take to dump, once one has: NFS shows a directory as it was up to 60 s ago."""
TELL_POLLS, SAVE_POLLS = 20, 24
"""Looks, for which the disk may keep what is told, and for which a save that is under way is waited for, before the end."""
AFTER_ALL = datetime.timedelta(minutes=10)
"""After the last alarm, by which every rank has dumped and ended."""


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


def collective_timeout(config: Config) -> datetime.timedelta:
    """Of what the ranks do together: later than any limit that is set, since the dumps tell more; a day where nobody watches."""
    longest = limits(config, waits_for_shards=True)
    if longest is None:
        return datetime.timedelta(days=1)
    return datetime.timedelta(seconds=longest.phase_s) + AFTER_ALL


class Watchdog:
    """Every rank has one, and tells it of its progress.

    Args:
        limits: None to watch nothing.
        dumps: Where ranks leave what they were doing, and how they agree on the end.
        end: Ends the process, whatever its threads are doing.
    """

    def __init__(self, limits: Limits | None, dumps: Dumps, end: Callable[[int], object] = os._exit) -> None:
        self._limits, self._dumps, self._end = limits, dumps, end
        least_s = limits.least_s if limits else 60.0
        self._poll_s, self._gather_s = min(POLL_S, least_s / 10), min(GATHER_S, 3 * least_s)
        self._awake_s = self._since_s = 0.0
        self._looked_at = time.monotonic()
        self._longest_s = {PREFLIGHT: 0.0}
        self._phase, self._teaches, self._more_s = STEP, STEP, None  # type: tuple[str, str | None, float | None]
        self._beats = 0
        self._is_saving: Callable[[], bool] = lambda: False
        self._look, self._peer_dumped = None, False  # type: tuple[threading.Thread | None, bool]
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

    def spares(self, is_saving: Callable[[], bool]) -> None:
        """While `is_saving`, the end waits a little: what is nearly saved is not lost."""
        self._is_saving = is_saving

    def beat(self) -> None:
        """Something was done. Cheap enough for every micro batch."""
        if self._teaches is not None:
            longest_s = self._longest_s.get(self._teaches, 0.0)
            self._longest_s[self._teaches] = max(longest_s, self._awake_s - self._since_s)
        self.stir()

    def stir(self) -> None:
        """A sign of life from which nothing is learnt: what was waited for depends on disks and networks."""
        self._since_s = self._awake_s
        self._beats += 1

    @contextlib.contextmanager
    def phase(self, name: str, *, more_s: float | None = None, teaches: str | None = None) -> Iterator[None]:
        """A block that is no usual step, with a limit between two beats.

        Args:
            name: Shown; and the limit is learnt from the blocks of that name before.
            more_s: The limit is not learnt, but phase_s and so much more.
            teaches: Whose limit is learnt from the beats inside all the same.
        """
        outer = self._phase, self._teaches, self._more_s
        self.stir()
        self._phase, self._teaches, self._more_s = name, name if more_s is None else teaches, more_s
        try:
            yield
        finally:
            self.beat()
            self._phase, self._teaches, self._more_s = outer

    def _silence(self) -> Silence:
        assert self._limits is not None
        limit_s = self._limits.of(self._longest_s.get(self._phase))
        if self._more_s is not None:
            limit_s = self._limits.phase_s + self._more_s
        return Silence(self._phase, self._awake_s - self._since_s, limit_s, self._beats)

    # In the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._limits is not None
        while self._sleep():
            silence = self._silence()
            is_over = silence.seconds > silence.limit_s
            # A peer's limit may be another: whoever is silent too joins in, so that all dumps are of one moment.
            if is_over or (silence.seconds > self._limits.least_s / 2 and self._has_a_peer_dumped()):
                self._sound(silence)

    def _sleep(self) -> bool:
        """Until the next look; False once nothing is to be watched any more."""
        if self._ended.wait(self._poll_s):
            return False
        now = time.monotonic()
        self._awake_s += min(now - self._looked_at, 2 * self._poll_s)
        self._looked_at = now
        return True

    def _wait_while(self, is_so: Callable[[], bool], seconds: float) -> None:
        until_s = self._awake_s + seconds
        while is_so() and self._awake_s < until_s and self._sleep():
            pass

    def _goes_on(self, silence: Silence) -> bool:
        return self._ended.is_set() or self._beats != silence.beats

    def _sound(self, silence: Silence) -> None:
        """Dump, wait for the dumps of the others, have it told once, and end the process; or withdraw, if it goes on after all.

        No disk is touched in this thread: one that stalls may be what hangs.
        """
        withdrawn = threading.Event()
        self._beside(lambda: self._tell(silence, withdrawn), self._gather_s + TELL_POLLS * self._poll_s)
        if not withdrawn.is_set():
            self._wait_while(self._is_saving, SAVE_POLLS * self._poll_s)
        if not withdrawn.is_set() and self._goes_on(silence):
            self._beside(lambda: self._withdraw(withdrawn), TELL_POLLS * self._poll_s)
        if not withdrawn.is_set() and not self._ended.is_set():
            self._end(NodeError.exit_code)

    def _beside(self, work: Callable[[], None], seconds: float) -> None:
        """Done in another thread, which is left behind where it takes longer."""
        thread = threading.Thread(target=work, name="watchdog's disk", daemon=True)
        thread.start()
        thread.join(self._poll_s)
        self._wait_while(thread.is_alive, seconds)

    # In threads beside that one, which a disk may block ---------------------------------------------------------------

    def _has_a_peer_dumped(self) -> bool:
        """As the last look saw it; one that gets no answer is not followed by another."""
        if self._look is None or not self._look.is_alive():
            self._peer_dumped = False
            self._look = threading.Thread(target=self._look_at_peers, name="watchdog's look", daemon=True)
            self._look.start()
        self._look.join(self._poll_s / 2)
        return self._peer_dumped

    def _look_at_peers(self) -> None:
        with contextlib.suppress(OSError):
            self._peer_dumped = self._dumps.are_begun()

    def _tell(self, silence: Silence, withdrawn: threading.Event) -> None:
        goes_on = functools.partial(self._goes_on, silence)
        try:
            self._dumps.write(silence)
            until_s = self._awake_s + self._gather_s
            while self._awake_s < until_s and not self._dumps.are_complete() and not goes_on():
                self._ended.wait(self._poll_s)
            if goes_on() or not self._dumps.conclude(goes_on, self._poll_s):
                self._withdraw(withdrawn)
        except Exception as error:  # whatever it is: the end is what matters
            complain(f"warning: the stacks of a hung attempt could not be written: {error!r}")

    def _withdraw(self, withdrawn: threading.Event) -> None:
        with contextlib.suppress(OSError):
            if self._dumps.withdraw():
                withdrawn.set()
