"""A rank as the product starts it, with real faults at exact steps, or with one safeguard taken out.

rank.py RUN_DIR [--signal STEP RANK] [--kill STEP RANK] [--pause STEP RANK] [--hang STEP RANK] [--once] [--nan STEP]
        [--without warm-up|rng|scaler] [--loss-scale S] [--pause-start] [--full RANK] [--slow-validation SECONDS]
        [--slow-batches SECONDS] [--slow-tensors SECONDS] [--nodes N] [--other-disk NODE] [--version RANK VERSION]
        [--slow-link NODE] [--own-disks] [--late-dir SECONDS] [--blind RANK] [--job RANK NAME]
        [--state-bytes] [--starve STEP RANK]
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpt2hpc import cli, jobs
from gpt2hpc.cluster import dist_env
from gpt2hpc.config import Config
from gpt2hpc.data.shards import Tokens
from gpt2hpc.training import bandwidth, preflight, rank_facts, saver, state, validation
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.evaluations import Evaluations
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.precision import Precision
from gpt2hpc.training.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    for fault in ("--signal", "--kill", "--pause", "--hang", "--starve"):
        parser.add_argument(fault, nargs=2, type=int, default=(-1, -1), metavar=("STEP", "RANK"))
    parser.add_argument("--once", action="store_true", help="only in the first start of a job")
    for slow in ("--slow-validation", "--slow-batches", "--slow-tensors"):
        parser.add_argument(slow, type=float, default=0.0)
    parser.add_argument(
        "--nodes", type=int, help="so many, n0, n1, …, in the eyes of the ranks, each with as many of them"
    )
    parser.add_argument("--other-disk", help="on that node another file system is mounted where the run directory is")
    parser.add_argument("--own-disks", action="store_true", help="each node has a disk of its own there")
    parser.add_argument(
        "--late-dir", type=float, default=0.0, help="so long others than rank 0 do not see the directory"
    )
    parser.add_argument("--blind", type=int, default=-1, metavar="RANK", help="it does not see the settings in time")
    parser.add_argument("--slow-link", help="messages between that node and others take long")
    parser.add_argument("--version", nargs=2, default=("", ""), metavar=("RANK", "VERSION"))
    parser.add_argument(
        "--job", nargs=2, default=("", ""), metavar=("RANK", "NAME"), help="what that rank takes it for"
    )
    parser.add_argument("--pause-start", action="store_true")
    parser.add_argument("--state-bytes", action="store_true", help="tell RUN/state-bytes-RANK what the optimizer holds")
    parser.add_argument("--full", type=int, default=-1, metavar="RANK")
    parser.add_argument("--nan", type=int, default=-1, metavar="STEP")
    parser.add_argument("--without", choices=("warm-up", "rng", "scaler"))
    parser.add_argument("--loss-scale", type=float)
    arguments = parser.parse_args()
    _be_on_a_node(arguments)
    if not arguments.once or os.environ.get(dist_env.RESTART) == "0":
        _add_faults(arguments)
    _take_out(arguments.without)
    if arguments.state_bytes:
        _tell_state_bytes()
    if arguments.loss_scale:
        new_scaler = lambda self: torch.amp.GradScaler("cpu", init_scale=arguments.loss_scale, growth_interval=3)  # noqa: E731
        Precision.new_scaler = new_scaler  # type: ignore[method-assign]
    return cli.run(lambda argv: jobs.Train(argv[0])(), [arguments.run_dir])


def _tell_state_bytes() -> None:
    genuine = Trainer.train

    def train(self: Trainer) -> Any:
        ended = genuine(self)
        held = [value.nbytes for kinds in self.learner._optimizer.state.values() for value in kinds.values()]
        (self.run_dir.path / f"state-bytes-{self.ranks.rank}").write_text(str(sum(held)))
        return ended

    Trainer.train = train  # type: ignore[method-assign]


def _add_faults(arguments: argparse.Namespace) -> None:
    genuine = Trainer.optimizer_step

    def optimizer_step(self: Trainer, stream: Iterator[Tokens]) -> Any:
        here = self.step + 1, self.ranks.rank
        for fault, number in (
            (arguments.signal, signal.SIGTERM),
            (arguments.kill, signal.SIGKILL),
            (arguments.pause, signal.SIGSTOP),
        ):
            if here == tuple(fault):
                self.saves.settle(self.log)  # so that it is known what was saved before
                os.kill(os.getpid(), number)
        if here == tuple(arguments.hang):
            hang_here()
        if here == tuple(arguments.starve):
            self.saves.settle(self.log)
            torch.empty(2**50)  # more than a machine has
        if here[0] == arguments.nan:
            with torch.no_grad():
                self.learner.model.ln_f.weight.fill_(torch.nan)
        return genuine(self, stream)

    Trainer.optimizer_step = optimizer_step  # type: ignore[method-assign]
    validate = Evaluations._validate

    def _validate(self: Evaluations, step: int) -> None:
        time.sleep(arguments.slow_validation)
        validate(self, step)

    Evaluations._validate = _validate  # type: ignore[method-assign]
    _slow_down(arguments)
    if arguments.pause_start:
        find = Trainer._find

        def _find(self: Trainer, config: Config) -> Any:
            os.kill(os.getpid(), signal.SIGSTOP)
            return find(self, config)

        Trainer._find = _find  # type: ignore[method-assign]
    if os.environ.get("RANK", "0") == str(arguments.full):

        def full(path: Path, contents: bytes | memoryview) -> None:
            with Path("/dev/full").open("wb", buffering=0) as file:
                file.write(contents)

        saver.durable.write_bytes = full


def _slow_down(arguments: argparse.Namespace) -> None:
    """Batches of the validation, and tensors that are loaded."""
    to_device, tensors = validation.to_device, Checkpoint.tensors

    def slowly(*batch: Any) -> Any:
        time.sleep(arguments.slow_batches)
        return to_device(*batch)

    def one_by_one(self: Checkpoint, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        for each in tensors(self, prefix):
            time.sleep(arguments.slow_tensors)
            yield each

    validation.to_device = slowly  # type: ignore[attr-defined]
    Checkpoint.tensors = one_by_one  # type: ignore[method-assign]


def _be_on_a_node(arguments: argparse.Namespace) -> None:
    rank = os.environ.get("RANK", "0")
    if arguments.version[0] == rank:
        rank_facts.__version__ = arguments.version[1]  # type: ignore[attr-defined]
    if arguments.job[0] == rank:
        os.environ[dist_env.JOB] = arguments.job[1]
    if rank == str(arguments.blind):
        jobs._settings_here = lambda run, env: Config()
    if arguments.nodes is None:
        return
    node = f"n{int(rank) * arguments.nodes // int(os.environ['WORLD_SIZE'])}"
    os.environ["SLURMD_NODENAME"] = node
    if arguments.late_dir and rank != "0":
        _see_it_late(arguments.late_dir)
    if (arguments.other_disk == node or (arguments.own_disks and node != "n0")) and "MOUNTED" not in os.environ:
        os.environ["MOUNTED"] = "1"
        shell = (
            f"mount -t tmpfs none {shlex.quote(arguments.run_dir)} && exec {shlex.join([sys.executable, *sys.argv])}"
        )
        os.execvp("unshare", ["unshare", "-m", "sh", "-c", shell])
    exchange = bandwidth._exchange

    def slowly(*tensors: torch.Tensor, partner: int) -> None:
        if arguments.slow_link == node:
            time.sleep(0.5)
        exchange(*tensors, partner=partner)

    bandwidth._exchange = slowly


def _see_it_late(seconds: float) -> None:
    """As a client of NFS that remembers that a directory was not there."""
    genuine, until = preflight.durable.write_bytes, []

    def write_bytes(path: Path, contents: bytes | memoryview) -> None:
        until.append(time.monotonic() + seconds)
        if time.monotonic() < until[0]:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        genuine(path, contents)

    preflight.durable.write_bytes = write_bytes


def hang_here() -> None:
    """As a library that waits for what never comes."""
    threading.Event().wait()


def _take_out(safeguard: str | None) -> None:
    """The negative controls: without the safeguard, a resumed run must differ."""
    if safeguard == "warm-up":
        Learner.warm_up = lambda self: None  # type: ignore[method-assign]
    elif safeguard == "scaler":
        state.load_scaler = lambda scaler, facts: None
    elif safeguard == "rng":
        genuine = Checkpoint.rank_state

        def rank_state(self: Checkpoint, rank: int) -> state.RankState:
            if rank == 2:
                state.seed_rank(0, rank, self.step)
                return state.rank_state(torch.device("cpu"))
            return genuine(self, rank)

        Checkpoint.rank_state = rank_state  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
