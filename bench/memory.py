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
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import machine, versions
from gpt2hpc import config_io
from gpt2hpc.config import Config
from gpt2hpc.training.footprint import Footprint, Way, footprint

RESULTS = Path(__file__).parent / "results"
SIZES = ("gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m")
WAYS = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "sharded optimizer": {"shard_optimizer": True},
    "both": {"activation_checkpointing": True, "shard_optimizer": True},
}
CPU_GB = 5.0
"""The most that a case may be foretold to take on a CPU, which may be others' too."""


def config_of(size: str, way: str, ranks: int, block_size: int | None) -> Config:
    config = config_io.load(config_io.presets()[size])
    model = dataclasses.replace(config.model, block_size=block_size or config.model.block_size)
    train = dataclasses.replace(
        config.train, micro_batch_size=1, tokens_per_step=model.block_size * ranks, compile=False, **WAYS[way]
    )
    return dataclasses.replace(config, model=model, train=train)


def told(config: Config, micro_batch: int, ranks: int, *, sixteen_bits: bool) -> Footprint:
    train = config.train
    way = Way(ranks, sixteen_bits, recomputes=train.activation_checkpointing, shards=train.shard_optimizer)
    return footprint(config.model, way, micro_batch=micro_batch)


def measure(config: Config, micro_batch: int, ranks: int) -> int | None:
    """Bytes, in this process; None where there were not enough."""
    import torch

    from gpt2hpc.cluster.dist_env import DistEnv
    from gpt2hpc.training.learner import Learner
    from gpt2hpc.training.process_group import Ranks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    for _, change in sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    ):
        live += change
        most = max(most, live)
    return sum(state) + sum(parameter.nbytes for parameter in learner.model.parameters()) + most


def measured(arguments: argparse.Namespace, size: str, way: str, micro_batch: int) -> int | None:
    words = ["--one", json.dumps([size, way, micro_batch]), "--ranks", str(arguments.ranks)]
    words += ["--block-size", str(arguments.block_size)] if arguments.block_size else []
    done = subprocess.run([sys.executable, "-m", "bench.memory", *words], capture_output=True, text=True, check=True)
    found: int | None = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(arguments: argparse.Namespace, *, limit_bytes: float, sixteen_bits: bool) -> list[dict[str, Any]]:
    """A case each, those that fit."""
    found = []
    for size in arguments.sizes:
        for way in WAYS:
            config = config_of(size, way, arguments.ranks, arguments.block_size)
            for micro_batch in arguments.micro_batches:
                need = told(config, micro_batch, arguments.ranks, sixteen_bits=sixteen_bits)
                if need.total > limit_bytes:
                    continue
                took = measured(arguments, size, way, micro_batch)
                row = {"size": size, "way": way, "micro_batch": micro_batch, "bytes": took}
                found.append(row | {"foretold": need.total, "parts": dataclasses.asdict(need)})
                print(json.dumps(found[-1]), flush=True)
    return found


def table(facts: dict[str, Any]) -> str:
    lines = []
    for row in facts["rows"]:
        took, need = row["bytes"], row["foretold"]
        own = "out of memory | |" if took is None else f"{took / 1e9:.2f} | {need / took - 1:+.1%} |"
        lines.append(f"| {row['size']} | {row['micro_batch']} | {row['way']} | {need / 1e9:.2f} | {own}")
    made = f"Made on {facts['made']} by `{facts['command']}`, with "
    return "\n".join(
        [
            "# Memory",
            "",
            f"The most that one rank holds in a step, in GB, in {facts['precision']} on {facts['device']}, without torch.compile; "
            f"sequences of {facts['block_size']} tokens. A sharded optimizer is that of rank 0 of {facts['ranks']}.",
            f"{made}{', '.join(f'{name} {version}' for name, version in facts['versions'].items())}.",
            "",
            "| | micro batch | | foretold | measured | foretold is off by |",
            "| --- | ---: | --- | ---: | ---: | ---: |",
            *lines,
            "",
            "Cases that are foretold to take more than there is are left out.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--ranks", type=int, default=8, help="that share a sharded optimizer")
    parser.add_argument("--block-size", type=int, help="instead of the size's own")
    parser.add_argument("--one", help="measure this one, in this process")
    arguments = parser.parse_args(argv)
    if arguments.one:
        size, way, micro_batch = json.loads(arguments.one)
        config = config_of(size, way, arguments.ranks, arguments.block_size)
        print(json.dumps(measure(config, micro_batch, arguments.ranks)))
        return
    import torch

    gpu = torch.cuda.is_available()
    limit_bytes = torch.cuda.get_device_properties(0).total_memory if gpu else CPU_GB * 1e9
    sixteen_bits = gpu and torch.cuda.get_device_capability()[0] >= 7
    words = " ".join(sys.argv[1:] if argv is None else argv)
    facts = {
        "device": torch.cuda.get_device_name() if gpu else f"a CPU, {machine()['cpu']}",
        "precision": "16 bits" if sixteen_bits else "fp32",
        "block_size": arguments.block_size or 1024,
        "ranks": arguments.ranks,
        "made": datetime.date.today().isoformat(),
        "command": f"python -m bench.memory {words}".strip(),
        "machine": machine() | {"load_before": round(os.getloadavg()[0], 1)},
        "versions": {"python": platform.python_version(), **versions(["torch"])},
        "rows": rows(arguments, limit_bytes=limit_bytes, sixteen_bits=sixteen_bits),
    }
    name = "memory" if gpu else "memory-cpu"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(facts))
    print(table(facts))


if __name__ == "__main__":
    main()
