"""GPUs and what joins them, as their makers publish it: the defaults of a plan, each of which a flag overrides."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gpt2hpc.errors import UsageError
from gpt2hpc.gpu_peaks import PEAK_TFLOPS

BUS_EFFICIENCY = 0.8
"""Share of a link's rate that an all-reduce reaches: 235 of the A100's 300 GB/s over NVLink, and the rule for networks too
("expect to get 320Gbps" of 400), both in stas00/ml-engineering, network/README.md, at 0030e63. Published all-reduces
reach from a third to 0.96 of the slowest link; docs/plan.md lists them."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its usual node.

    Args:
        name: What `--gpu` takes.
        model: Its name in `gpu_peaks`.
        mfu: Share of the peak that a training of GPT-2 reaches on one node.
        mfu_source: Where that share is from.
        memory_gb: Of one GPU.
        per_node: GPUs of a usual node.
        link_gbyte_s: Between the GPUs of a node, each, one direction.
        adapters: Of a usual node to its network.
        network_gbit_s: Of these, one direction, all together.
        node: The node that the last four describe.
    """

    name: str
    model: str
    mfu: float
    mfu_source: str
    memory_gb: float
    per_node: int
    link_gbyte_s: float
    adapters: int
    network_gbit_s: float
    node: str

    @property
    def peak_tflops(self) -> float:
        """Dense bf16 tensor-core peak, fp16 on V100."""
        return PEAK_TFLOPS[self.model]

    def network_of(self, gpus: int) -> float:
        """Gbit/s of a node with so many of these GPUs: their share of the usual node's adapters, of which there is one at least."""
        return self.network_gbit_s * max(1 / self.adapters, min(1.0, gpus / self.per_node))


# Memory: NVIDIA's data sheet of each GPU.
# Links: NVIDIA's data sheets give both directions together; NVLink 2, 3, 4 and 5 are 150, 300, 450 and 900 GB/s in one,
# PCIe 4 and 5 are 31 and 63 (stas00/ml-engineering, network/README.md, at 0030e63).
_MEGATRON = "Megatron-LM: 39 TFLOP/s of one V100, 30 % (Shoeybi et al. 2019, arXiv:1909.08053)"
_NANOGPT = (
    "nanoGPT on 8 A100: 47.84 % (modal-labs/multinode-training-guide, nanoGPT/README.md, at 4ff9c79), less a margin"
)
_FOUNDRY = "MPT 760m on 8 H100: 34.9 % (mosaicml/llm-foundry, scripts/train/benchmarking/README.md, at 061f2c7)"
_AS_H100 = "assumed as the H100's; measure it"
_ASSUMED = "assumed; measure it"
_SERVER = "a PCIe server with one adapter; look up yours"

_TABLE = (
    Gpu("v100", "V100", 0.30, _MEGATRON, 32, 8, 150, 4, 400, "DGX-1: NVLink 2, 4 × EDR 100 Gbit/s (data sheet)"),
    Gpu("a100", "A100", 0.45, _NANOGPT, 80, 8, 300, 8, 1600, "DGX A100: NVLink 3, 8 × HDR 200 Gbit/s (data sheet)"),
    Gpu("a100-40", "A100", 0.45, _NANOGPT, 40, 8, 300, 8, 1600, "DGX A100: NVLink 3, 8 × HDR 200 Gbit/s (data sheet)"),
    Gpu("a40", "A40", 0.40, _ASSUMED, 48, 8, 31, 1, 100, f"PCIe 4; {_SERVER}"),
    Gpu("l40s", "L40S", 0.35, _ASSUMED, 48, 8, 31, 1, 200, f"PCIe 4; {_SERVER}"),
    Gpu("rtx4090", "RTX 4090", 0.40, _ASSUMED, 24, 8, 31, 1, 25, f"PCIe 4; {_SERVER}"),
    Gpu("h100", "H100", 0.35, _FOUNDRY, 80, 8, 450, 8, 3200, "DGX H100: NVLink 4, 8 × NDR 400 Gbit/s (data sheet)"),
    Gpu("h100-pcie", "H100 PCIe", 0.35, _AS_H100, 80, 4, 63, 1, 400, f"PCIe 5; {_SERVER}"),
    Gpu("h200", "H200", 0.35, _AS_H100, 141, 8, 450, 8, 3200, "DGX H200: NVLink 4, 8 × NDR 400 Gbit/s (data sheet)"),
    Gpu(
        "gh200",
        "GH200",
        0.35,
        _AS_H100,
        96,
        4,
        450,
        4,
        800,
        "quad GH200: NVLink 4, 4 × Slingshot 200 Gbit/s (as at CSCS Alps)",
    ),
    Gpu("b200", "B200", 0.35, _AS_H100, 180, 8, 900, 8, 3200, "DGX B200: NVLink 5, 8 × NDR 400 Gbit/s (data sheet)"),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}


def find(name: str) -> Gpu:
    """The GPU of that name; UsageError, with the known names, where there is none."""
    wanted = name.lower().replace("_", "-")
    if wanted in GPUS:
        return GPUS[wanted]
    near = difflib.get_close_matches(wanted, GPUS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"--gpu={name} is unknown; {hint}the known ones are {', '.join(GPUS)}; for another give the nearest one and "
        "--peak-tflops, --mfu, --link-gbyte-s and --network-gbit-s"
    )
