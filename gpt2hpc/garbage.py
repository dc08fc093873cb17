"""Python's search for garbage, in a process that imports torch: half a million objects, which all stay.

To look through them again and again while they come, and once more as the process ends, is a third of the CPU time that a rank
takes to begin and to end.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def unsought() -> Iterator[None]:
    """Around imports: what they bring is not looked through, neither meanwhile nor later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        leave()
        if was_enabled:
            gc.enable()


def collect() -> None:
    """Search all once, also what was left: a cycle may go through it."""
    gc.unfreeze()
    gc.collect()


def leave() -> None:
    """Nothing that is there now is looked through again: it stays until the process ends, which takes it all."""
    gc.freeze()
