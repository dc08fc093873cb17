"""Linear layers whose products a CPU computes at its full width.

torch's wheels multiply fp32 matrices by MKL, which on CPUs of other makers than Intel leaves AVX-512 unused: half of the
CPU. oneDNN, which the wheels hold too, uses it: 2.0 to 2.3 times the FLOP/s on AMD's Zen 5 (bench/NOTES.md). Elsewhere,
in other number formats, for little models and for the few rows of generating, these are torch's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 16
"""Below, memory is what takes the time."""
SMALL = 1 << 22
"""Multiplications; below, calling an operator of Python's takes longer than they do."""


class Linear(nn.Linear):
    """torch's, but for how it is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias: x shaped (…, n), weight (m, n), bias (m), to (…, m)."""
    is_small = x.numel() < FEW_ROWS * x.shape[-1] or x.numel() * weight.shape[0] < SMALL
    if is_small or not (MKL_IS_NARROW and _is_plain_fp32(x)):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.gpt2hpc.linear(x, weight, bias)
    return out


def _is_plain_fp32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _is_mkl_narrow() -> bool:
    """Whether oneDNN is here, and this CPU one with AVX-512 that MKL does not use."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return wide and _maker() != "GenuineIntel" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _maker() -> str:
    """As the processor names it: GenuineIntel, AuthenticAMD; Intel's where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "GenuineIntel"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "GenuineIntel")


MKL_IS_NARROW = _is_mkl_narrow()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _like_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        torch.ops.gpt2hpc.linear(rows, weight.t(), None).view(x.shape) if wants_x else None,
        torch.ops.gpt2hpc.linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if wants_weight else None,
        rows.sum(0) if wants_bias else None,
    )


# An operator of its own, since the compiler takes oneDNN's only for weights that never change.
_LIBRARY = torch.library.Library("gpt2hpc", "DEF")  # type: ignore[no-untyped-call]
torch.library.define("gpt2hpc::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", lib=_LIBRARY)
torch.library.impl("gpt2hpc::linear", "CPU", _product, lib=_LIBRARY)
torch.library.register_fake("gpt2hpc::linear", _like_product, lib=_LIBRARY)
torch.library.register_autograd("gpt2hpc::linear", _backward, setup_context=_keep, lib=_LIBRARY)
