"""Two processes that add up what they have: the first thing that every training does."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from gpt2hpc import cli
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.errors import NodeError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.process_group import joined, select_device
from gpt2hpc.trials.bench import Bench
from gpt2hpc.trials.ranks import run_ranks

RANKS = 2
NUMBERS = 1 << 20


def run(bench: Bench) -> str:
    """NCCL where there are two GPUs; gloo else, over which ranks on GPUs agree on saves and stops too."""
    over_nccl = bench.gpus >= RANKS
    run = RunDir(bench.folder / "run")
    device = "cuda" if over_nccl else "cpu"
    run_ranks(bench, run, "gpt2hpc.trials.allreduce", device, nproc=RANKS, gpus=RANKS if over_nccl else 0)
    text = f"{RANKS} processes add up {NUMBERS:,} numbers over {'NCCL' if over_nccl else 'gloo'}"
    return f"{text}; with one GPU there is nothing to try NCCL on" if bench.device == "cuda" and not over_nccl else text


def main(argv: list[str]) -> int:
    """One of the processes."""
    env = DistEnv.from_env(os.environ)
    device = select_device(argv[0], env)
    with joined(env, device):
        numbers = torch.arange(NUMBERS, dtype=torch.float32, device=device) % 1000 + env.rank
        expected = RANKS * (torch.arange(NUMBERS, dtype=torch.float32) % 1000) + sum(range(RANKS))
        dist.all_reduce(numbers)
        if not torch.equal(numbers.cpu(), expected):
            raise NodeError("the sum is wrong")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(lambda argv: main(list(argv))))
