"""Published results, to see one's own beside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """HellaSwag, zero-shot: shares of the 10,042 validation examples; None where nobody has published it."""

    model: str
    parameters_millions: int
    acc: float | None
    acc_norm: float
    source: str


_BUILD_NANOGPT = "build-nanogpt, hellaswag.py: acc_norm by tokens, as here"
_PLAY = "build-nanogpt, play.ipynb"
_GPT3 = "Brown et al. 2020, arXiv:2005.14165, table H.1"

BASELINES: tuple[Baseline, ...] = (
    Baseline("GPT-2 124M", 124, 0.2859, 0.2955, _BUILD_NANOGPT),
    Baseline("GPT-2 355M", 355, None, 0.3752, _PLAY),
    Baseline("GPT-2 774M", 774, None, 0.4320, _PLAY),
    Baseline("GPT-2 1558M", 1558, 0.3842, 0.4893, _BUILD_NANOGPT),
    Baseline("GPT-3 Small", 125, None, 0.337, _GPT3),
    Baseline("GPT-3 Medium", 350, None, 0.436, _GPT3),
    Baseline("GPT-3 Large", 760, None, 0.510, _GPT3),
    Baseline("GPT-3 XL", 1320, None, 0.547, _GPT3),
)
"""GPT-3's paper normalizes by tokens too; other harnesses by characters, which gives other numbers."""
