"""Whether a step fits into a GPU, what would if it does not, and the micro batch that `auto` will find there."""

from __future__ import annotations

import dataclasses

from gpt2hpc.config import Config
from gpt2hpc.planning.hardware import Gpu
from gpt2hpc.training.footprint import Footprint, Way, footprint, most_fitting

USABLE = 0.92
"""Of a GPU's memory; the rest goes to CUDA itself, NCCL's buffers and gaps between tensors. Assumed."""


def usable_bytes(gpu: Gpu) -> float:
    return USABLE * gpu.memory_gb * 1e9


def needed(config: Config, *, gpus: int, micro_batch: int) -> Footprint:
    """Of each of so many GPUs."""
    return footprint(config.model, way_of(config, gpus), micro_batch=micro_batch)


def way_of(config: Config, gpus: int) -> Way:
    """Every GPU here is fast in 16 bits, which train.precision=auto takes."""
    train = config.train
    return Way(
        ranks=gpus,
        sixteen_bits=train.precision != "fp32",
        recomputes=train.activation_checkpointing,
        shards=train.shard_optimizer,
        muon=config.optimizer.name == "muon",
    )


def settled(config: Config, gpu: Gpu, gpus: int) -> Config:
    """With a number for `auto`: the most that fits, 1 where nothing does. What divides the step is chosen from there."""
    if config.train.micro_batch_size != "auto":
        return config
    samples = max(1, config.train.tokens_per_step // (config.model.block_size * gpus))
    most = most_fitting(config.model, way_of(config, gpus), memory_bytes=usable_bytes(gpu))
    return _with(config, micro_batch_size=max(1, min(most, samples)))


def remedy(config: Config, gpu: Gpu, gpus: int) -> str:
    """What to change so that it fits: the least that does, in the order of what it costs."""
    sharded = {"shard_optimizer": True} if gpus > 1 else {}
    for changes in ({}, sharded, {"activation_checkpointing": True}, {"activation_checkpointing": True, **sharded}):
        tried = _with(config, **changes)
        most = most_fitting(tried.model, way_of(tried, gpus), memory_bytes=usable_bytes(gpu))
        if most:
            flags = [f"--train.{name} true" for name in changes if not getattr(config.train, name)]
            smaller = (
                [f"--train.micro_batch_size {most}" + (" or less" if most > 1 else "")]
                if most < config.train.rows
                else []
            )
            return "try " + " ".join([*flags, *smaller])
    return "choose a GPU with more memory, or more of them with --train.shard_optimizer true"


def _with(config: Config, **train: object) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))  # type: ignore[arg-type]
