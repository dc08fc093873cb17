"""The memory of a rank by size and micro batch, with and without what saves it: `python -m bench.memory [--sizes gpt2-124m …]`.

Each case is a process of its own that takes two steps of the trainer's learner, without torch.compile: the first makes the
optimizer's state, the second is measured. On CUDA that is torch.cuda.max_memory_allocated; on the CPU the weights and the
optimizer's state, and the most that the allocator gave beside them, as torch.profiler has it. A sharded optimizer is that of rank 0
of `--ranks`, which needs no peers for it. Beside each stands what gpt2hpc.training.footprint foretells, by which cases that would
take more than there is are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from bench import report
from gpt2hpc import config_io
from gpt2hpc.config import Config
from gpt2hpc.training import precision
from gpt2hpc.training.footprint import Footprint, Way, footprint

SIZES = ("gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "sharded optimizer": {"shard_optimizer": True},
    "both": {"activation_checkpointing": True, "shard_optimizer": True},
}
CPU_GB = 5.0
"""The most that a case may be foretold to take on a CPU, which may be others' too."""


def config_of(size: str, way: str, options: argparse.Namespace) -> Config:
    config = config_io.load(config_io.presets()[size])
    model = dataclasses.replace(config.model, block_size=options.block_size or config.model.block_size)
    tokens = model.block_size * options.ranks
    train = dataclasses.replace(config.train, micro_batch_size=1, tokens_per_step=tokens, compile=False, **WAYS[way])
    return dataclasses.replace(config, model=model, train=train)


def told(config: Config, micro_batch: int, ranks: int, *, sixteen_bits: bool) -> Footprint:
    train = config.train
    way = Way(ranks, sixteen_bits, recomputes=train.activation_checkpointing, shards=train.shard_optimizer)
    return footprint(config.model, way, micro_batch=micro_batch)


def measure(config: Config, micro_batch: int, ranks: int, device_name: str) -> int | None:
    """Bytes, in this process; None where there were not enough."""
    import torch

    from gpt2hpc.cluster.dist_env import DistEnv
    from gpt2hpc.training.learner import Learner
    from gpt2hpc.training.process_group import Ranks

    device = torch.device(device_name)
    env = DistEnv(rank=0, local_rank=0, world_size=ranks, local_world_size=1, job="1", restart=0, nodes="n1")
    learner = Learner(config, Ranks(env, device), lambda: None)
    try:
        learner.rehearse(1)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            learner.rehearse(micro_batch)
            return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        learner.rehearse(micro_batch)
    state = [value.nbytes for kinds in learner._optimizer.state.values() for value in kinds.values()]
    live = most = 0
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    for _, change in sorted((each.start_ns(), each.nbytes()) for each in events):
        live += change
        most = max(most, live)
    return sum(state) + sum(parameter.nbytes for parameter in learner.model.parameters()) + most


def rows(
    options: argparse.Namespace, device: str, *, limit_bytes: float, sixteen_bits: bool
) -> Iterator[dict[str, Any]]:
    """A case each, those that fit."""
    for size, way, micro_batch in itertools.product(options.sizes, options.ways, options.micro_batches):
        need = told(config_of(size, way, options), micro_batch, options.ranks, sixteen_bits=sixteen_bits)
        if need.total > limit_bytes:
            continue
        words = ["--one", json.dumps([size, way, micro_batch]), "--ranks", str(options.ranks), "--device", device]
        words += ["--block-size", str(options.block_size)] if options.block_size else []
        done = subprocess.run(
            [sys.executable, "-m", "bench.memory", *words], stdout=subprocess.PIPE, text=True, check=True
        )
        row = {"size": size, "way": way, "micro_batch": micro_batch, "bytes": json.loads(done.stdout.splitlines()[-1])}
        print(json.dumps(row), file=sys.stderr, flush=True)
        yield row | {"foretold": need.total, "parts": dataclasses.asdict(need)}


def table(facts: dict[str, Any]) -> str:
    lines = []
    for row in facts["rows"]:
        took, need = row["bytes"], row["foretold"]
        own = "out of memory | |" if took is None else f"{took / 1e9:.2f} | {need / took - 1:+.1%} |"
        lines.append(f"| {row['size']} | {row['micro_batch']} | {row['way']} | {need / 1e9:.2f} | {own}")
    return "\n".join(
        [
            "# Memory",
            "",
            f"The most that one rank holds in a step, in GB, in {facts['precision']}, without torch.compile; a sharded optimizer is "
            f"that of rank 0 of {facts['ranks']}. Cases that are foretold to take over {facts['limit_bytes'] / 1e9:.0f} GB are "
            f"left out. {f'Sequences of {length} tokens.' if (length := facts['block_size']) else ''}",
            "",
            *report.made(facts),
            "| | micro batch | | foretold | measured | foretold is off by |",
            "| --- | ---: | --- | ---: | ---: | ---: |",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(config_io.presets()), default=SIZES)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--ranks", type=int, default=8, help="that share a sharded optimizer")
    parser.add_argument("--block-size", type=int, help="instead of the size's own")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--name", help="of the files in bench/results (default: memory, or memory-cpu)")
    parser.add_argument("--one", help="measure this one, in this process")
    options = parser.parse_args()
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.one:
        size, way, micro_batch = json.loads(options.one)
        print(json.dumps(measure(config_of(size, way, options), micro_batch, options.ranks, device)))
        return
    on_gpu = device == "cuda"
    limit_bytes = torch.cuda.get_device_properties(0).total_memory if on_gpu else CPU_GB * 1e9
    sixteen_bits = precision.choose("auto", torch.device(device)).dtype != torch.float32
    facts = {
        **report.facts(device, ["torch"]),
        "precision": "16 bits" if sixteen_bits else "fp32",
        "ranks": options.ranks,
        "block_size": options.block_size,
        "limit_bytes": limit_bytes,
        "rows": list(rows(options, device, limit_bytes=limit_bytes, sixteen_bits=sixteen_bits)),
    }
    report.write(options.name or ("memory" if on_gpu else "memory-cpu"), facts, table(facts))


if __name__ == "__main__":
    main()
