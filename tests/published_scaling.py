"""Published throughput of data-parallel training on one node and on many, beside what `gpt2hpc.planning.scaling` makes of it.

The figures are in published_scaling.csv; here is where each series is from, and what of it the model needs. Nothing here is fitted.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc.planning import hardware, scaling
from gpt2hpc.planning.scaling import Fabric, Share, Traffic

FILE = Path(__file__).with_suffix(".csv")
NODE = 8
"""GPUs a node, in all series."""


@dataclass(frozen=True)
class Series:
    """All are FSDP with full sharding: weights gathered twice and gradients scattered once each micro batch.

    `weight_bytes` and `gradient_bytes` are those of the values that are sent; the links are the GPU's in `hardware`.
    """

    source: str
    gpu: str
    weight_bytes: int
    gradient_bytes: int
    block_size: int
    remark: str


FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md, at 061f2c7ce64e655100286584a7629e2a09f827ba"
EXAMPLES = "mosaicml/examples, examples/llm/throughput/README.md, at 3bbda73be98aa986366930685452cc109b33df80"
TITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, at 31a17bfdb70bab6f62a13d21816a5339b911d6e3"

# PURE sends weights and gradients in 16 bits, DEFAULT weights in 32 and gradients in 16: get_mixed_precision in
# mosaicml/composer, composer/trainer/mosaic_fsdp.py, at 281844ca81a6d2733f5a314a4589acba98dcec9f.
SERIES = {
    "foundry-a100": Series(FOUNDRY, "a100-40", 2, 2, 2048, "MPT, 1600 Gbit/s RoCE a node as its heading says, PURE"),
    "foundry-h100": Series(FOUNDRY, "h100", 4, 2, 2048, "MPT, DEFAULT; the network is not stated, so the usual node's"),
    "examples-a100-80": Series(
        EXAMPLES, "a100", 2, 2, 2048, "MPT's predecessor, PURE; the network is stated in llm-foundry"
    ),
    "strong-a100-80": Series(EXAMPLES, "a100", 4, 2, 2048, "the same global batch on 8 and 16 GPUs, DEFAULT"),
    "strong-a100-40": Series(EXAMPLES, "a100-40", 4, 2, 2048, "the same global batch on 8 to 64 GPUs, DEFAULT"),
    "torchtitan-h100": Series(TITAN, "h100", 2, 4, 8192, "Llama 3.1 8B, 400 Gbit/s a GPU as its text says"),
}

MPT_EMBEDDING = 50_432
LLAMA = (8_030_261_248, 32, 2 * 128_256 * 4096)
MODELS = {
    "125m": (125_311_488, 12, MPT_EMBEDDING * 768),
    "350m": (355_985_408, 24, MPT_EMBEDDING * 1024),
    "760m": (760_470_528, 24, MPT_EMBEDDING * 1536),
    "1b": (1_315_950_592, 24, MPT_EMBEDDING * 2048),
    "3b": (2_651_837_440, 32, MPT_EMBEDDING * 2560),
    "7b": (6_658_859_008, 32, MPT_EMBEDDING * 4096),
    "13b": (12_853_954_560, 40, MPT_EMBEDDING * 5120),
    "30b": (29_975_214_080, 48, MPT_EMBEDDING * 7168),
    "8b": LLAMA,
    "8b-compile": LLAMA,
    "8b-float8": LLAMA,
}
"""Parameters, blocks, and parameters outside of the blocks (embedding and head)."""


@dataclass(frozen=True)
class Figure:
    """One published row."""

    series: str
    model: str
    gpus: int
    micro_batch: int
    global_batch: int
    tokens_per_s_per_gpu: float

    @property
    def name(self) -> str:
        return f"{self.series} {self.model} {self.gpus} GPUs batch {self.global_batch}"

    @property
    def smallest_micro_batch(self) -> int:
        """The rest, where a GPU's part of the batch is no multiple of the micro batch."""
        return self.global_batch // self.gpus % self.micro_batch or self.micro_batch

    @property
    def share(self) -> Share:
        accumulation = self.global_batch / self.gpus / self.micro_batch
        return Share(self.micro_batch, accumulation, SERIES[self.series].block_size)

    @property
    def base(self) -> Figure:
        """The row on one node: of the same global batch where there is one."""
        single = [each for each in figures() if (each.series, each.model, each.gpus) == (self.series, self.model, NODE)]
        return next((each for each in single if each.global_batch == self.global_batch), single[-1])

    @property
    def is_like_its_base(self) -> bool:
        """Whether the single node shows how fast a GPU computes here: with no smaller micro batch, and none above twice its."""
        base = self.base
        return self.smallest_micro_batch >= base.smallest_micro_batch and self.micro_batch <= 2 * base.micro_batch


@functools.cache
def figures() -> tuple[Figure, ...]:
    with FILE.open(encoding="utf-8") as file:
        return tuple(
            Figure(
                row["series"],
                row["model"],
                int(row["gpus"]),
                int(row["micro_batch"]),
                int(row["global_batch"]),
                float(row["tokens_per_s_per_gpu"]),
            )
            for row in csv.DictReader(file)
        )


def on_many_nodes() -> list[Figure]:
    return [figure for figure in figures() if figure.gpus > NODE]


def predicted(figure: Figure) -> float:
    """Tokens/s of a GPU, from the figure of its single node."""
    series, base = SERIES[figure.series], figure.base
    gpu = hardware.GPUS[series.gpu]
    parameters, layers, rest = MODELS[figure.model]
    traffic = Traffic("fsdp", parameters, rest, layers, series.gradient_bytes, series.weight_bytes)
    fabric = Fabric(NODE, gpu.link_gbyte_s, gpu.network_gbit_s)
    rate = scaling.compute_rate(fabric, traffic, base.share, gpus=NODE, tokens_per_s_per_gpu=base.tokens_per_s_per_gpu)
    return scaling.step(fabric, traffic, figure.share, gpus=figure.gpus, compute_tokens_per_s=rate).tokens_per_s_per_gpu


def error(figure: Figure) -> float:
    """Of the prediction, as a share of what was published."""
    return predicted(figure) / figure.tokens_per_s_per_gpu - 1


# Where communication dominates ----------------------------------------------------------------------------------------

ONE_BIT_ADAM = (
    "Tang et al. 2021, 1-bit Adam, arXiv:2102.02888, table 1: BERT-Large, DeepSpeed, all-reduce after the backward pass"
)
BERT_LARGE_BYTES = 2 * 340e6
"""Gradients in fp16 of 340 million parameters (Devlin et al. 2019, arXiv:1810.04805, section 3)."""


@dataclass(frozen=True)
class Profile:
    """A row of that table: milliseconds of a step's parts, on V100s."""

    network: str
    nodes: int
    gpus: int
    accumulation: int
    forward_ms: float
    all_reduce_ms: float
    backward_ms: float
    optimizer_ms: float

    @property
    def step_ms(self) -> float:
        return self.forward_ms + self.all_reduce_ms + self.backward_ms + self.optimizer_ms


# All with 16 sequences a GPU and micro batch. "Ethernet": 40 Gbit/s, 4 GPUs a node; "InfiniBand": EDR 100 Gbit/s, 8 a node.
PROFILES = (
    Profile("Ethernet", 1, 4, 1, 35.99, 239.76, 59.95, 74.21),
    Profile("Ethernet", 2, 8, 1, 34.95, 1897.21, 61.23, 75.26),
    Profile("Ethernet", 4, 16, 1, 36.94, 2133.24, 62.82, 76.85),
    Profile("Ethernet", 8, 32, 1, 37.91, 2173.35, 60.71, 75.63),
    Profile("Ethernet", 16, 64, 1, 35.71, 2275.43, 60.81, 75.59),
    Profile("Ethernet", 16, 64, 4, 137.80, 2259.36, 243.72, 74.92),
    Profile("InfiniBand", 1, 8, 1, 32.74, 28.18, 59.73, 57.29),
    Profile("InfiniBand", 2, 16, 1, 32.86, 183.74, 56.49, 58.60),
    Profile("InfiniBand", 4, 32, 1, 33.45, 297.28, 56.81, 57.98),
    Profile("InfiniBand", 8, 64, 1, 32.81, 336.40, 59.99, 57.79),
    Profile("InfiniBand", 8, 64, 4, 131.04, 339.52, 237.92, 56.91),
)


def bus_gbyte_s(profile: Profile) -> float:
    """What its all-reduce has reached: 2·(n−1)/n × bytes / time."""
    return 2 * (profile.gpus - 1) / profile.gpus * BERT_LARGE_BYTES / profile.all_reduce_ms / 1e6


def predicted_step_ms(profile: Profile, *, network_gbit_s: float, efficiency: float) -> float:
    """From the single node's forward, backward and optimizer times and a network of that rate."""
    single = next(each for each in PROFILES if (each.network, each.nodes) == (profile.network, 1))
    fabric = Fabric(single.gpus, bus_gbyte_s(single) / efficiency, network_gbit_s, efficiency)
    computing = profile.accumulation * (single.forward_ms + single.backward_ms) + single.optimizer_ms
    return computing + 1e3 * fabric.collective_s(BERT_LARGE_BYTES, profile.gpus, rounds=2)


# All-reduces by themselves --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllReduce:
    """Bus bandwidth of NCCL's all-reduce of a large message, as published."""

    source: str
    gpu: str
    nodes: int
    network_gbit_s: float
    bus_gbyte_s: float

    @property
    def reached(self) -> float:
        """Of the slowest link's rate."""
        fabric = Fabric(NODE, hardware.GPUS[self.gpu].link_gbyte_s, self.network_gbit_s, efficiency=1.0)
        return self.bus_gbyte_s * 1e9 / fabric.bandwidth(self.nodes * NODE)


ALL_REDUCES = (
    AllReduce("stas00/ml-engineering, network/README.md, at 0030e63", "a100", 1, 0, 235),
    AllReduce("NVIDIA/nccl-tests issue 309", "h100", 1, 0, 275),
    AllReduce("NVIDIA/nccl-tests issue 100", "a100", 2, 4 * 200, 91),
    AllReduce("NVIDIA/nccl-tests issue 119", "a100-40", 3, 4 * 200, 96),
    AllReduce("NVIDIA/nccl issue 495", "a100", 2, 8 * 100, 75),
    AllReduce("NVIDIA/nccl-tests issue 309", "h100", 2, 8 * 400, 250),
)
