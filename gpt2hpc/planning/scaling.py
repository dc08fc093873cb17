"""How long a step takes on more GPUs: computing, and what of the communication it does not hide.

Every quantity is one that a reader can look up or work out by hand; docs/plan.md has the formulae with their numbers:

    collective   rounds × (n−1)/n × bytes / bandwidth + latency         (4)
    DDP          exposed = max(all-reduce − backward pass, the last bucket), once a step       (5)
    FSDP         exposed = max(gather + gather + scatter − micro batch, the root's), each micro batch
    step         accumulation × micro batch × block / rate + exposed    (6)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gpt2hpc.planning.hardware import BUS_EFFICIENCY

BUCKET_BYTES = 25 * 2**20
"""DistributedDataParallel reduces gradients in buckets of 25 MiB (its default)."""
BACKWARD_SHARE = 2 / 3
"""Of a micro batch's time: the backward pass multiplies twice as often as the forward pass."""

# Latencies in s of one hop and of starting a collective: NCCL's own tables for its Simple protocol (NVIDIA/nccl,
# src/graph/tuning.cc, at 01afd20: baseLat and hwLat), with the formulae there.
_RING_START_S, _RING_LINK_S, _RING_NETWORK_S = 8.4e-6, 3.4e-6, 9.6e-6
_TREE_LINK_S, _TREE_NETWORK_S = 28e-6, 50e-6


@dataclass(frozen=True)
class Fabric:
    """What joins the GPUs: `link` within a node, for each GPU; `network` of a node; both in one direction.

    `efficiency` is the share of those rates that a collective reaches.
    """

    gpus_per_node: int
    link_gbyte_s: float
    network_gbit_s: float
    efficiency: float = BUS_EFFICIENCY

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus_per_node)

    def bandwidth(self, gpus: int) -> float:
        """Bytes/s of a ring through all of them: of its slowest link."""
        link, network = self.link_gbyte_s * 1e9, self.network_gbit_s * 1e9 / 8
        return self.efficiency * (link if self.nodes(gpus) == 1 else min(link, network))

    def latency_s(self, gpus: int, *, rounds: int) -> float:
        """Of one collective: a ring, or for an all-reduce (2 rounds) a tree, if that is faster."""
        nodes = self.nodes(gpus)
        ring = _RING_START_S + rounds * ((gpus - nodes) * _RING_LINK_S + (nodes - 1) * _RING_NETWORK_S)
        tree = 2 * ((min(gpus, self.gpus_per_node) - 1) * _TREE_LINK_S + math.log2(nodes) * _TREE_NETWORK_S)
        return min(ring, tree) if rounds == 2 else ring

    def collective_s(self, size_bytes: float, gpus: int, *, rounds: int, calls: int = 1) -> float:
        """Seconds of `calls` collectives that move `size_bytes` together; 2 rounds: all-reduce, 1: gather or scatter."""
        if gpus == 1:
            return 0.0
        moved = rounds * (gpus - 1) / gpus * size_bytes / self.bandwidth(gpus)
        return moved + calls * self.latency_s(gpus, rounds=rounds)


@dataclass(frozen=True)
class Traffic:
    """What data parallelism sends for a model.

    Args:
        kind: ddp reduces all gradients once a step; fsdp gathers the weights twice and scatters the gradients each micro batch.
        parameters: Of the model, with the embedding's rows of padding.
        last: Parameters whose gradient is ready last, so that nothing hides them: the embedding, which is the head too.
        layers: Units that FSDP gathers one by one, beside the root.
        gradient_bytes: Of one gradient as it is sent.
        weight_bytes: Of one weight as FSDP gathers it.
        weights_sent_after: Tensors that hold the weights and are sent, once each, after a step: a sharded optimizer's, with ddp.
    """

    kind: Literal["ddp", "fsdp"]
    parameters: int
    last: int
    layers: int = 0
    gradient_bytes: int = 4
    weight_bytes: int = 4
    weights_sent_after: int = 0

    def total_s(self, fabric: Fabric, gpus: int) -> float:
        """All of it: of a step (ddp), or of a micro batch (fsdp)."""
        return self._seconds(fabric, gpus, self.parameters, self.layers + 1)

    def tail_s(self, fabric: Fabric, gpus: int) -> float:
        """What cannot begin before the computing has ended."""
        return self._seconds(fabric, gpus, self.last, 1)

    def after_s(self, fabric: Fabric, gpus: int) -> float:
        """What is sent when all else is done."""
        if not self.weights_sent_after:
            return 0.0
        return fabric.collective_s(4 * self.parameters, gpus, rounds=1, calls=self.weights_sent_after)

    def _seconds(self, fabric: Fabric, gpus: int, parameters: int, units: int) -> float:
        gradients = parameters * self.gradient_bytes
        if self.kind == "ddp":
            # Buckets are of the weights' kind, whatever is sent of them.
            buckets = -(-parameters * self.weight_bytes // BUCKET_BYTES)
            return fabric.collective_s(gradients, gpus, rounds=2, calls=buckets)
        scattered = fabric.collective_s(gradients, gpus, rounds=1, calls=units)
        return scattered + fabric.collective_s(2 * parameters * self.weight_bytes, gpus, rounds=1, calls=2 * units)


@dataclass(frozen=True)
class Share:
    """What one GPU does in a step: micro batches of that many sequences, one after another."""

    micro_batch: int
    accumulation: float
    block_size: int

    @property
    def tokens(self) -> float:
        return self.micro_batch * self.accumulation * self.block_size


@dataclass(frozen=True)
class Step:
    """One optimizer step, in seconds; `communication_s` in all, of which `exposed_s` is not hidden."""

    gpus: int
    share: Share
    compute_s: float
    communication_s: float
    exposed_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def tokens_per_s(self) -> float:
        return self.gpus * self.share.tokens / self.seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.gpus


def step(fabric: Fabric, traffic: Traffic, share: Share, *, gpus: int, compute_tokens_per_s: float) -> Step:
    """A step of GPUs that compute, without any communication, so many tokens/s each."""
    micro_s = share.micro_batch * share.block_size / compute_tokens_per_s
    total, tail = traffic.total_s(fabric, gpus), traffic.tail_s(fabric, gpus)
    if traffic.kind == "ddp":
        after = traffic.after_s(fabric, gpus)
        communication, exposed = total + after, max(total - BACKWARD_SHARE * micro_s, tail) + after
    else:
        communication, exposed = share.accumulation * total, share.accumulation * max(total - micro_s, tail)
    return Step(gpus, share, share.accumulation * micro_s, communication, exposed)


def compute_rate(fabric: Fabric, traffic: Traffic, share: Share, *, gpus: int, tokens_per_s_per_gpu: float) -> float:
    """Tokens/s of a GPU's computing alone, from a whole training's on `gpus` of them: `step` undone, by bisection."""
    slow, fast = tokens_per_s_per_gpu, tokens_per_s_per_gpu * 1e3
    for _ in range(100):
        middle = math.sqrt(slow * fast)
        reached = step(fabric, traffic, share, gpus=gpus, compute_tokens_per_s=middle).tokens_per_s_per_gpu
        slow, fast = (middle, fast) if reached < tokens_per_s_per_gpu else (slow, middle)
    return slow
