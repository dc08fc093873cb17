"""How long the steps wait for a save, and how long it takes: `python -m bench.checkpoint [--rounds 3]`.

The state is that of a preset (weights and AdamW's two moments in fp32), on one rank, on the local disk. Each contender is a
process of its own that saves the same state several times, after one save that is not counted; the contenders take turns. While
an asynchronous save is under way one of the cores does arithmetic, as the steps would. What is compared:

    torch.save          in place, with fsync: what a plain training loop does
    dcp.save            torch.distributed.checkpoint, synchronous
    dcp.async_save      the same, by its thread
    ours, waited for    the saver, waited for at once: hashed, read back, compared, renamed
    ours                the saver as the trainer uses it
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
INTERVAL_S = 15 * 60
OPEN = contextlib.ExitStack()
Times = tuple[float, float]
"""Seconds that the steps wait, and seconds until the save is there."""


def state_of(preset: str) -> dict[str, Any]:
    import torch

    from gpt2hpc import config_io
    from gpt2hpc.config import Config
    from gpt2hpc.model.gpt import GPT

    parser = config_io.new_parser("bench", "")
    _, config = config_io.parse(parser, ["--preset", preset])
    assert isinstance(config, Config)
    state: dict[str, Any] = {}
    for name, parameter in GPT(config.model).named_parameters():
        state[f"model/{name}"] = parameter.detach()
        for kind in ("exp_avg", "exp_avg_sq"):
            state[f"optimizer/{kind}/{name}"] = torch.rand_like(parameter)
    return state


def with_torch_save(folder: Path) -> Callable[[dict[str, Any], int], Times]:
    import torch

    def save(state: dict[str, Any], number: int) -> Times:
        began = time.perf_counter()
        with (folder / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        return seconds, seconds

    return save


def with_dcp(folder: Path, *, asynchronous: bool) -> Callable[[dict[str, Any], int], Times]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())

    def save(state: dict[str, Any], number: int) -> Times:
        shutil.rmtree(folder / f"dcp{number - 1}", ignore_errors=True)
        began = time.perf_counter()
        if asynchronous:
            future = dcp.async_save(state, checkpoint_id=str(folder / f"dcp{number}"))
            stall = time.perf_counter() - began
            while not future.done():
                work()
            future.result()
            return stall, time.perf_counter() - began
        dcp.save(state, checkpoint_id=str(folder / f"dcp{number}"))
        seconds = time.perf_counter() - began
        return seconds, seconds

    return save


def with_ours(folder: Path, *, asynchronous: bool) -> Callable[[dict[str, Any], int], Times]:
    import torch

    from gpt2hpc.cluster.dist_env import DistEnv
    from gpt2hpc.training import checkpoint
    from gpt2hpc.training import state as rank
    from gpt2hpc.training.process_group import joined
    from gpt2hpc.training.saver import Order, Saver

    env = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n1")
    cpu = torch.device("cpu")
    saver = Saver(OPEN.enter_context(joined(env, cpu)), attempt=1, fence=lambda: None)

    def save(state: dict[str, Any], number: int) -> Times:
        target = folder / checkpoint.name(started="20260131-120000", tag="bench", step=number)
        began = time.perf_counter()
        saver.begin(state, Order(target, rank.rank_state(cpu), {"step": number}))
        stall = time.perf_counter() - began
        while asynchronous and saver.is_saving:
            work()
        saver.wait()
        seconds = time.perf_counter() - began
        for old in checkpoint.found(folder)[1:]:
            shutil.rmtree(old.path)
        return stall if asynchronous else seconds, seconds

    return save


def work() -> None:
    """What the steps do meanwhile: arithmetic on one of the cores."""
    import torch

    a = torch.ones(256, 256)
    for _ in range(20):
        a = a @ a * 1e-3


CONTENDERS: dict[str, Callable[[Path], Callable[[dict[str, Any], int], Times]]] = {
    "torch.save": with_torch_save,
    "dcp.save": lambda folder: with_dcp(folder, asynchronous=False),
    "dcp.async_save": lambda folder: with_dcp(folder, asynchronous=True),
    "ours, waited for": lambda folder: with_ours(folder, asynchronous=False),
    "ours": lambda folder: with_ours(folder, asynchronous=True),
}


def measure(name: str, preset: str, saves: int) -> list[Times]:
    state = state_of(preset)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        save = CONTENDERS[name](Path(folder))
        save(state, 0)
        times = [save(state, number) for number in range(1, saves + 1)]
        OPEN.close()
        return times


def table(facts: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {each['stall_s'] * 1e3:,.0f} | {each['total_s']:.2f} | {each['stall_s'] / INTERVAL_S:.3%} |"
        for name, each in facts["contenders"].items()
    ]
    return "\n".join(
        [
            "# Saving",
            "",
            f"{facts['preset']}: {facts['bytes'] / 1e9:.2f} GB of weights and AdamW's moments, one rank, "
            f"{facts['machine']['cores']} cores of {facts['machine']['cpu']}, local disk; medians of {facts['saves']} saves each "
            f"in {facts['rounds']} rounds by turns.",
            f"Made on {facts['made']} by `{facts['command']}`, with {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}.",
            "",
            "| | ms that the steps wait | s until it is there | share of a 15-minute interval |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            "Ours hashes, fsyncs, reads back, compares and renames; the others do none of it but torch.save's fsync here.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3, help="a round")
    parser.add_argument("--one", choices=list(CONTENDERS), help="measure this one, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.preset, arguments.saves)))
        return
    times: dict[str, list[Times]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name, found in times.items():
            words = ["--one", name, "--preset", arguments.preset, "--saves", str(arguments.saves)]
            done = subprocess.run(
                [sys.executable, "-m", "bench.checkpoint", *words], capture_output=True, text=True, check=True
            )
            found += [tuple(each) for each in json.loads(done.stdout.splitlines()[-1])]
            print(f"{name}: {[f'{stall * 1e3:.0f} ms of {total:.1f} s' for stall, total in found]}", flush=True)
    facts = {
        "preset": arguments.preset,
        "bytes": sum(tensor.nbytes for tensor in state_of(arguments.preset).values()),
        "rounds": arguments.rounds,
        "saves": arguments.saves,
        "made": datetime.date.today().isoformat(),
        "command": f"python -m bench.checkpoint --rounds {arguments.rounds} --saves {arguments.saves}",
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(["torch", "safetensors"])},
        "contenders": {
            name: {
                "stall_s": statistics.median(stall for stall, _ in found),
                "total_s": statistics.median(total for _, total in found),
                "all": found,
            }
            for name, found in times.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "checkpoint.md").write_text(table(facts))
    print(table(facts))


if __name__ == "__main__":
    main()
