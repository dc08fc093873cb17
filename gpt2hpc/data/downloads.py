"""A few files at once from the Hub, in threads that nobody has to wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Downloads:
    """`count` at a time, in the order in which they were asked for.

    The threads are daemons: one that waits for the Hub, for minutes perhaps, must not hold up who is told to stop. A pool's are not:
    Python waits for them as it ends.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._queue = queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]()
        self._asked: list[Future[Any]] = []
        for _ in range(count):
            threading.Thread(target=self._work, name="download", daemon=True).start()

    def submit(self, fetch: Callable[[], T]) -> Future[T]:
        """What it will return, or raise."""
        future: Future[T] = Future()
        self._asked.append(future)
        self._queue.put((fetch, future))
        return future

    def close(self) -> None:
        """Begin no further one, and wait for none."""
        for future in self._asked:
            future.cancel()
        for _ in range(self._count):
            self._queue.put(None)

    def _work(self) -> None:
        for fetch, future in iter(self._queue.get, None):
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fetch())
                except BaseException as error:  # raised again for who asks for the result
                    future.set_exception(error)
