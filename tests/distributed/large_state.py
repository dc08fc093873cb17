"""A state shaped like GPT-2 1558M's, written by all ranks at once, or read back by as many as there are; one rank of torchrun.

    large_state.py write|read DIRECTORY

Weights and both moments of AdamW: 4.7 billion elements, of one byte each, so that it fits where tests run. A tensor has one value.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpt2hpc import config_io, durable
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import checkpoint, state
from gpt2hpc.training.process_group import Ranks, joined
from gpt2hpc.training.saver import Order, Saver

CPU = torch.device("cpu")


def shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = GPT(config_io.load(config_io.presets()["gpt2-1558m"]).model)
    named = dict(model.named_parameters())
    kinds = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    return {f"{kind}/{name}": parameter.shape for kind in kinds for name, parameter in named.items()}


def value(name: str) -> int:
    return zlib.crc32(name.encode()) % 255 + 1


def write(directory: Path, ranks: Ranks) -> dict[str, float]:
    genuine, times = durable.write_bytes, {}

    def timed(path: Path, contents: bytes | memoryview) -> None:
        began = time.time()
        genuine(path, contents)
        if path.name.startswith("state-"):
            times.update(began=began, ended=time.time(), bytes=len(contents))

    durable.write_bytes = timed
    tensors = {name: torch.tensor(value(name), dtype=torch.uint8).expand(shape) for name, shape in shapes().items()}
    saver = Saver(ranks, attempt=1, fence=lambda: None)
    target = directory / checkpoint.name(started="20260131-120000", tag="gpt2-1558m-ctx1024", step=1)
    saver.begin(tensors, Order(target, state.rank_state(CPU), {"step": 1}))
    saver.wait()
    return times


def read(directory: Path, ranks: Ranks) -> dict[str, int]:
    """Every tensor by one rank; returns how many, and how many elements, were as expected."""
    found = ranks.first_works(lambda: checkpoint.newest_valid(directory, print))
    assert found is not None
    expected, right, elements = shapes(), 0, 0
    for number, (name, tensor) in enumerate(found.tensors()):
        if number % ranks.world_size == ranks.rank:
            assert tensor.shape == expected[name]
            assert bool((tensor == value(name)).all()), name
            right, elements = right + 1, elements + tensor.numel()
    return {"tensors": right, "elements": elements}


def main() -> None:
    torch.set_num_threads(1)
    what, directory = sys.argv[1], Path(sys.argv[2])
    with joined(DistEnv.from_env(os.environ), CPU) as ranks:
        results = ranks.gather({"write": write, "read": read}[what](directory, ranks))
        if ranks.is_first:
            print(json.dumps(results))


if __name__ == "__main__":
    main()
