"""Save for ever in a child, kill it at a random moment, and see that what it reported is there whole; 20 times.

    kill_during_save.py DIRECTORY SEED

A program of its own, since it forks after importing torch and before torch has started a thread.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.config import CheckpointConfig
from gpt2hpc.training import checkpoint, state
from gpt2hpc.training.process_group import joined
from gpt2hpc.training.saver import Order, Saver

CPU = torch.device("cpu")
KILLS = 20


def main() -> None:
    directory, source = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    step = interrupted = 0
    for _ in range(KILLS):
        reported, cut = _kill_one(directory, step, source.uniform(0.0, 0.15))
        interrupted += cut
        found = checkpoint.newest_valid(directory, print)
        assert found is not None, "nothing is left"
        assert found.step >= reported, f"step {reported} was reported, {found.step} is the newest whole one"
        expected = torch.full((300, 1000), float(found.step))
        assert torch.equal(dict(found.tensors())["model/a"], expected), "loaded, but not what was saved"
        step = found.step
    print(f"{KILLS} kills, {interrupted} of them during a save, {step} steps")


def _kill_one(directory: Path, step: int, seconds: float) -> tuple[int, bool]:
    """The last step that the child reported as saved, and whether the kill cut a save."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _save_for_ever(directory, step, writer)
        finally:
            os._exit(1)
    os.close(writer)
    first = os.read(reader, 8)  # its start-up is over and its first save done
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rest = os.read(reader, 1 << 20)
    os.close(reader)
    return int.from_bytes((first + rest)[-8:]), any(path.suffix == ".tmp" for path in directory.iterdir())


def _save_for_ever(directory: Path, step: int, report: int) -> None:
    torch.set_num_threads(1)
    env = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n1")
    with joined(env, CPU) as ranks:
        checkpoint.remove_unfinished(directory)
        saver = Saver(ranks, attempt=1, fence=lambda: None)
        while True:
            step += 1
            target = directory / checkpoint.name(started="20260131-120000", tag="tiny", step=step)
            saver.begin(
                {"model/a": torch.full((300, 1000), float(step))}, Order(target, state.rank_state(CPU), {"step": step})
            )
            saver.wait()
            os.write(report, step.to_bytes(8))
            checkpoint.prune(directory, saved_step=step, config=CheckpointConfig(keep_last=2), keep=[])


if __name__ == "__main__":
    main()
