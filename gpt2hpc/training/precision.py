"""Number formats, chosen by what a device computes fast rather than by what it supports."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from gpt2hpc import gpu_peaks
from gpt2hpc.config import PrecisionName

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """`dtype` of the matrix products; weights and optimizer state stay fp32."""

    dtype: torch.dtype
    device: torch.device

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def new_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which only fp16 needs: disabled, it changes nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def choose(name: PrecisionName, device: torch.device) -> Precision:
    """`auto`: bf16 from Ampere on, fp16 on Volta and Turing, else fp32 (bf16 slows a CPU without instructions for it to 0.65×)."""
    if name == "auto":
        name = _fast_precision(device)
    if device.type == "cuda":  # TF32 for what stays fp32
        torch.set_float32_matmul_precision("high")
    return Precision(_DTYPES[name], device)


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device, where known."""
    if device.type != "cuda":
        return None
    tflops = gpu_peaks.of(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def _fast_precision(device: torch.device) -> PrecisionName:
    if device.type != "cuda":
        return "fp32"
    major, _ = torch.cuda.get_device_capability(device)
    return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
