"""Save in a child whose n-th file operation kills it or fails, for every n; each time, what is there must be whole.

    save_faults.py DIRECTORY kill|ENOSPC|EDQUOT|EROFS|EACCES|EIO EVERY      # every operation, or every so many

The operations are those that Python reports to audit hooks (open, mkdir, rename, unlink, rmdir), every fsync, and each write cut at
several bytes. A program of its own, since it forks after importing torch and before torch has started a thread.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpt2hpc import durable
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.config import CheckpointConfig
from gpt2hpc.errors import RunDirError
from gpt2hpc.training import checkpoint, state
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.process_group import joined
from gpt2hpc.training.saver import Order, Saver

CPU = torch.device("cpu")
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}
CUTS = (0.0, 0.01, 0.5, 0.99, 1.0)
KEEP = CheckpointConfig(keep_last=2)
KILLED = 137


class Faults:
    """Counts the operations below `directory`, and strikes at one of them."""

    def __init__(self, directory: Path, at: int, strike: Callable[[], None]) -> None:
        self.directory, self.at, self.strike = str(directory), at, strike
        self.count, self.names = 0, []
        self.active = False

    def operation(self, name: str) -> None:
        if self.active:
            self.count += 1
            self.names.append(name)
            if self.count == self.at:
                self.strike()

    def install(self) -> None:
        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if event in EVENTS and str(arguments[0]).startswith(self.directory):
                self.operation(f"{event} {Path(str(arguments[0])).name}")

        sys.addaudithook(heard)
        fsync, write_bytes = os.fsync, durable.write_bytes

        def faulty_fsync(descriptor: int) -> None:
            self.operation("fsync")
            fsync(descriptor)

        def faulty_write(path: Path, contents: bytes | memoryview) -> None:
            for cut in CUTS:
                self.operation_after(path, contents, cut)
            write_bytes(path, contents)

        os.fsync = faulty_fsync
        durable.write_bytes = faulty_write

    def operation_after(self, path: Path, contents: bytes | memoryview, cut: float) -> None:
        """The operation is the write of the next byte: what came before is on the disk."""
        if self.active and self.count + 1 == self.at:
            self.active = False
            path.write_bytes(bytes(contents[: int(cut * len(contents))]))
            self.active = True
        self.operation(f"write {path.name} after {cut:.0%}")


def save(directory: Path, step: int, faults: Faults | None = None) -> None:
    torch.set_num_threads(1)
    env = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n1")
    with joined(env, CPU) as ranks:
        saver = Saver(ranks, attempt=1, fence=lambda: None)
        target = directory / checkpoint.name(started="20260131-120000", tag="tiny", step=step)

        def published(saved: Checkpoint) -> None:
            checkpoint.prune(directory, saved_step=saved.step, config=KEEP, keep=[])

        order = Order(
            target, state.rank_state(CPU), {"step": step}, texts=lambda: {"metrics.jsonl": b"{}\n"}, published=published
        )
        if faults:
            faults.active = True
        saver.begin(contents_of(step), order)
        saver.wait()


def contents_of(step: int) -> dict[str, torch.Tensor]:
    return {"model/a": torch.full((50, 100), float(step)), "optimizer/step/a": torch.tensor(float(step))}


def in_a_child(work: Callable[[], None]) -> tuple[int, str]:
    """Its exit code, and what it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 0
        try:
            work()
        except RunDirError as error:
            os.write(writer, f"RunDirError: {error}".encode())
            code = 9
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
            code = 1
        os._exit(code)
    os.close(writer)
    said = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.decode()


def strike_of(mode: str) -> Callable[[], None]:
    def kill() -> None:
        os._exit(KILLED)

    def fail() -> None:
        number = getattr(errno, mode)
        raise OSError(number, os.strerror(number))

    return kill if mode == "kill" else fail


def main() -> None:
    root, mode, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    before = root / "before"
    before.mkdir()
    for step in (1, 2):
        assert in_a_child(lambda step=step: save(before, step)) == (0, "")
    results, at = [], 1 - every
    while not results or results[-1]["struck"]:
        at += every
        directory = root / "now"
        shutil.copytree(before, directory)
        faults = Faults(directory, at, strike_of(mode))

        def struck_save(faults: Faults = faults, directory: Path = directory) -> None:
            faults.install()
            try:
                save(directory, 3, faults)
            finally:
                faults.active = False
                (root / "count").write_text(json.dumps([faults.count, faults.names[-1]]))

        (root / "count").write_text(json.dumps([at, "killed"]))
        code, said = in_a_child(struck_save)
        count, _ = json.loads((root / "count").read_text())
        found = checkpoint.newest_valid(directory, lambda text: None)
        assert found is not None, f"operation {at}: nothing is left"
        assert found.step == 3 or (found.step == 2 and code), (
            f"operation {at}: {code} {said}, and step {found.step} is there"
        )
        expected = contents_of(found.step)
        tensors = dict(found.tensors())
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), "loaded, but not what was saved"
        # what a next attempt does: it clears up, and can save
        checkpoint.remove_unfinished(directory)
        assert in_a_child(lambda directory=directory: save(directory, 3)) == (0, "")
        assert [(each.step, each.damage()) for each in checkpoint.found(directory)] == [(3, None), (2, None)]
        results.append({"at": at, "struck": count >= at, "code": code, "said": said, "step": found.step})
        shutil.rmtree(directory)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
