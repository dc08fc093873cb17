"""Memory that a training or an evaluation on a CPU frees is its own to use again.

Each step makes and frees the same tensors. glibc gives large ones back to the system each time, which hands out the same
pages again one by one, zeroed, as they are touched: a fifth of a step's time, and more (bench/NOTES.md). Kept, they cost
nothing, for an eighth to a quarter more memory; for several times as much where a few tensors, such as a small model's logits, are
most of it, as small ones come to lie in the holes. So it is not done where memory was measured to the limit (jobs.py).
"""

from __future__ import annotations

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""mallopt(3)."""
NEVER = 2**31 - 1
AT_LEAST = 64 << 20
"""Bytes that the heap grows by."""


def keep_freed() -> None:
    """Of this process, from now on; does nothing where the C library is another than glibc."""
    libc = _glibc()
    if libc is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, AT_LEAST)):
            libc.mallopt(parameter, value)


def give_back() -> None:
    """What is free now, once: whatever lies scattered among other things would be kept for good, and more of it with each step."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
