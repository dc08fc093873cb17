"""The units of one task, spread over processes: downloads ahead, live counts, and nothing left running or half-written."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.cluster.signals import SIGNALS
from gpt2hpc.data import encode, hub
from gpt2hpc.data.backends import Wanted, new_backend
from gpt2hpc.data.downloads import Downloads
from gpt2hpc.data.encode import Record
from gpt2hpc.data.plan import Plan, Unit
from gpt2hpc.data.sources import SourceFile
from gpt2hpc.errors import MissingError

DOWNLOADS = "downloads"
_FILES_AHEAD = 2
_POLL_S = 0.2


@dataclass(frozen=True)
class Work:
    """What the processes of a task need to know.

    Args:
        directory: Where the shards go; downloads lie in `downloads` there.
        plan: All units.
        tokenizer: The backend wanted.
        max_bad_documents: Documents of a unit that may be unreadable.
        made_by: Noted in each unit's record.
    """

    directory: Path
    plan: Plan
    tokenizer: Wanted = "auto"
    max_bad_documents: int = 0
    made_by: dict[str, Any] = field(default_factory=dict)

    def locate(self, file: SourceFile) -> Path:
        """Where a file lies once it has been fetched."""
        if not file.is_remote:
            return Path(file.path)
        dataset, inside = hub.split_path(file.path)
        return self.directory / DOWNLOADS / dataset.repo / (dataset.revision or "main") / inside


@dataclass
class Counts:
    """What has been done so far, by all processes."""

    characters: int = 0
    tokens: int = 0
    units: int = 0
    bytes: int = 0
    """Of text, in the units that are done."""


class Task:
    """Encodes units in `processes` processes.

    Args:
        work: What to do it with.
        free: Which source files to delete once all of their units are done.
        stop: Asked often; once true, the units at work are given up and the task ends.
    """

    def __init__(
        self, work: Work, *, processes: int, free: Callable[[SourceFile], bool], stop: Callable[[], bool]
    ) -> None:
        self.work, self._processes, self._free, self._stop = work, processes, free, stop
        self.counts = Counts()
        with _signals_held():
            resource_tracker.ensure_running()  # multiprocessing's own helper, which USR1 and USR2 would end
        context = multiprocessing.get_context("spawn")  # threads download here, and a fork would copy their locks
        self._characters, self._tokens = context.Value("Q", 0), context.Value("Q", 0)
        self._pool = ProcessPoolExecutor(
            processes, context, _start_worker, (os.getpid(), work, self._characters, self._tokens)
        )
        self._pids: set[int] = set()
        self._users: dict[int, list[Unit]] = {}
        for unit in work.plan.units:
            for number in unit.files:
                self._users.setdefault(number, []).append(unit)
        self._freed: set[int] = set()
        """Files to delete as soon as all of their units are done."""
        self._sure = False

    def run(self, units: Sequence[Unit], report: Callable[[Counts], None]) -> Iterator[tuple[Unit, Record | None]]:
        """Yields each unit as it is done, with None for one that another task did meanwhile.

        `report` is called several times a second. Ends early, without an error, when `stop` says so.
        """
        waiting, running = deque(units), dict[Future[Record | None], Unit]()
        with self._cleared_up(), contextlib.closing(_Coming(self.work, waiting)) as coming:
            while (waiting or running) and not self._stop():
                while waiting and len(running) < self._processes and coming.has(waiting[0]):
                    unit = waiting.popleft()
                    with _signals_held():  # a process begins here, if there are not enough
                        running[self._pool.submit(_encode, unit)] = unit
                self._pids |= set(self._pool._processes or ())
                finished, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                if not running:
                    time.sleep(_POLL_S)
                for future in finished:
                    unit = running.pop(future)
                    record = self._result(future)
                    self.counts.units += 1
                    self.counts.bytes += unit.bytes
                    self._free_files(unit)
                    yield unit, record
                self.counts.characters, self.counts.tokens = self._characters.value, self._tokens.value
                report(self.counts)

    def _result(self, future: Future[Record | None]) -> Record | None:
        try:
            return future.result()
        except BrokenProcessPool:
            raise MissingError(
                "a process was killed, most likely for want of memory: a unit takes about 1 GB; "
                "ask for more memory or fewer --processes, and run the same command again: what is done is kept"
            ) from None

    def _free_files(self, unit: Unit) -> None:
        """Delete files that no unit needs any more; local ones only once it is sure that the result can be finalized."""
        work = self.work
        self._freed |= {number for number in unit.files if self._free(work.plan.files[number])}
        if any(not work.plan.files[number].is_remote for number in self._freed) and not self._sure:
            self._sure = encode.has_both_splits(work.directory, work.plan)
        for number in sorted(self._freed):
            file = work.plan.files[number]
            if (file.is_remote or self._sure) and not encode.missing(work.directory, work.plan, self._users[number]):
                work.locate(file).unlink(missing_ok=True)
                self._freed.remove(number)

    @contextlib.contextmanager
    def _cleared_up(self) -> Iterator[None]:
        """However it ends, end the processes and remove what they were writing."""
        try:
            yield
        finally:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pid in self._pids:
                for path in durable.leftovers(self.work.directory):
                    if f".{socket.gethostname()}.{pid}." in path.name:
                        path.unlink(missing_ok=True)
            hub.clear_leftovers(self.work.directory / DOWNLOADS)


class _Coming:
    """Files of the Hub, fetched in the order of the units that need them, a few ahead."""

    def __init__(self, work: Work, waiting: deque[Unit]) -> None:
        self._work, self._waiting = work, waiting
        self._started: dict[int, Future[None]] = {}
        self._downloads = Downloads(_FILES_AHEAD)
        self.close = self._downloads.close

    def has(self, unit: Unit) -> bool:
        """Whether all files of the unit are here; begins to fetch them, and those of the next units. Raises what a download raised."""
        needed = [number for number in sorted(unit.files) if self._work.plan.files[number].is_remote]
        for number in needed:
            if number in self._started and self._started[number].done():
                self._started.pop(number).result()
        lacking = [number for number in needed if not self._is_here(number)]
        soon = dict.fromkeys(
            number
            for each in itertools.islice(self._waiting, 1 + _FILES_AHEAD)
            for number in sorted(each.files)
            if self._work.plan.files[number].is_remote
        )
        for number in [*lacking, *list(soon)[:_FILES_AHEAD]]:
            if number not in self._started and not self._is_here(number):
                self._started[number] = self._downloads.submit(functools.partial(self._fetch, number))
        return not lacking

    def _is_here(self, number: int) -> bool:
        file = self._work.plan.files[number]
        path = self._work.locate(file)
        return path.is_file() and path.stat().st_size == file.bytes

    def _fetch(self, number: int) -> None:
        file = self._work.plan.files[number]
        dataset, inside = hub.split_path(file.path)
        hub.fetch(dataset, inside, self._work.locate(file), size=file.bytes, sha256=file.hash.removeprefix("sha256:"))


def allowed_cores() -> int:
    """The cores that this process may use: Slurm's count for a task, else those it may run on; never all that the node has."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(given) if given.isdecimal() and int(given) > 0 else len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes that are started within have our signals blocked from their first moment; ours come a little later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a process -------------------------------------------------------------------------------------------------------

_work: Work
_done: Any = None


def _start_worker(parent: int, work: Work, characters: Any, tokens: Any) -> None:
    """Signals are the parent's to judge; without a parent there is no reason to live."""
    global _work, _done
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _work, _done = work, (characters, tokens)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(unit: Unit) -> Record | None:
    work = _work
    began = time.time()

    def count(characters: int, tokens: int) -> None:
        for value, more in zip(_done, (characters, tokens), strict=True):
            with value.get_lock():
                value.value += more

    return encode.encode_unit(
        work.directory,
        work.plan,
        unit,
        backend=new_backend(work.tokenizer),
        locate=work.locate,
        max_bad_documents=work.max_bad_documents,
        made={**work.made_by, "began": began, "host": socket.gethostname(), "pid": os.getpid()},
        count=count,
    )
