"""What GPUs compute at most, as NVIDIA's data sheets give it: for the share of it that a training reaches, and for plans."""

from __future__ import annotations

import re

PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "GB200": 2500,
    "A100": 312,
    "A800": 312,
    "A40": 149.7,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "V100S": 130,
    "RTX A6000": 155,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
    "T4": 65,
}
"""Dense bf16 (fp16 on V100 and T4) tensor-core peaks; a sheet's figure "with sparsity" is twice as much. Of a GPU with two names here,
as `H100 PCIe`, the first one counts."""


def of(name: str) -> float | None:
    """TFLOP/s of the GPU that CUDA calls so, as `NVIDIA A100-SXM4-80GB`; None where it is not known: an A4000 is no A40."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
