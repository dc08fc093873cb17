"""Functions whose first call in a process may be wrong by some thousand units in the last place, where several threads make it.

MKL, which torch 2.13 uses on x86, picks the kernel of a vector function at that function's first call; a thread that calls it at
the same moment may run one of low accuracy for its part (pytorch/pytorch#188792). A second call is right.
"""

from __future__ import annotations

import torch

NAMES = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma", "log"),
    *("log10", "log1p", "log2", "rsqrt", "sin", "sqrt", "tan", "tanh"),
)


def settle() -> None:
    """Make the first call of each by one thread."""
    for dtype in (torch.float32, torch.float64):
        few = torch.full((16,), 0.5, dtype=dtype)  # too few for a second thread
        for name in NAMES:
            getattr(torch, name)(few)
