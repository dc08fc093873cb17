"""The ranks of a run and their device.

CPU tensors travel over gloo and CUDA tensors over NCCL, in one group: control messages (a stop, a save, a barrier)
are CPU tensors and so never wait for the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore
from torch.distributed.rendezvous import rendezvous

from gpt2hpc import garbage
from gpt2hpc.cluster import interface
from gpt2hpc.cluster.dist_env import LOCAL, DistEnv
from gpt2hpc.errors import Gpt2hpcError, MissingError, NodeError, PeerGoneError, UsageError, error_for

_PEER_IS_GONE = ("closed by peer", "reset by peer", "Broken pipe", "ncclRemoteError")
TIMEOUT, TIMEOUT_APART = datetime.timedelta(minutes=12), datetime.timedelta(hours=2)
"""Until all have met, and of a collective where nobody asks for another; of one that threads beside the training do."""
ROUND_S = 30.0
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    `group` carries what is said here; None is the one that the training uses too.
    """

    env: DistEnv
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return self.env.rank

    @property
    def world_size(self) -> int:
        return self.env.world_size

    @property
    def is_first(self) -> bool:
        return self.env.rank == 0

    def use_device(self) -> None:
        """To be called in a new thread, which would else use the first GPU, and take memory of it."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def apart(self) -> Ranks:
        """The same ranks in a group of their own, for a thread; collective. It waits long for a slow disk."""
        self.barrier()  # which sees at once that a peer is gone; a new group would wait for it
        group = dist.new_group(backend="gloo", timeout=TIMEOUT_APART)
        return dataclasses.replace(self, group=group)

    def barrier(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self.group)

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first_works(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; an error of the user's in it ends all with the same one.

        However long it takes: the ranks meet in between, since one that waited longer than a collective may take would
        give up. It runs in a thread on rank 0.
        """
        future = self._started(work) if self.is_first else None
        while not self.from_first(future is not None and bool(wait([future], ROUND_S).done)):
            pass
        result = None
        with self.first_decides():
            if future is not None:
                result = future.result()
        answer: T = self.from_first(result)
        return answer

    def _started(self, work: Callable[[], T]) -> Future[T]:
        """In a thread that does not keep a process alive whose peers are gone, as one of a pool would."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                self.use_device()
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    @contextlib.contextmanager
    def first_decides(self) -> Iterator[None]:
        """An error of the user's inside, on rank 0, ends every rank with the same error."""
        caught: Gpt2hpcError | None = None
        try:
            yield
        except Gpt2hpcError as error:
            caught = error
        told = self.from_first((caught.exit_code, str(caught)) if caught else None)
        if caught:
            raise caught
        if told:
            raise error_for(*told)


@contextlib.contextmanager
def joined(env: DistEnv, device: torch.device, timeout: datetime.timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The process group, from rendezvous to the end. A collective in it may take as long as `timeout`."""
    _die_with_launcher(env)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where = {**_meeting(env), **_device_id(device)}
    dist.init_process_group(backend, rank=env.rank, world_size=env.world_size, timeout=timeout, **where)
    ranks = Ranks(env, device)
    try:
        _refuse_strangers(ranks)
        yield ranks
    except RuntimeError as error:
        if any(word in str(error) for word in _PEER_IS_GONE):
            raise PeerGoneError(f"rank {env.rank} lost a peer and ends without saving: {error}") from error
        raise
    finally:
        # DDP keeps the group alive in reference cycles. Its threads must end before the interpreter does: one that still
        # wants the GIL then aborts the process, after all went well.
        garbage.collect()
        dist.destroy_process_group()


def _refuse_strangers(ranks: Ranks) -> None:
    """Jobs that meet at one port would train together: no rank goes on then, and the restarts meet elsewhere."""
    env = ranks.env
    # By all: torchrun's ranks may know of a batch job on some nodes only.
    told = set(ranks.gather((env.job, env.restart)))
    jobs = sorted(f"{job} (restart {restart})" for job, restart in told if not job.startswith(LOCAL))
    if len(jobs) > 1:  # names of no batch job are never in common
        raise PeerGoneError(f"rank {env.rank} met ranks of other jobs at port {env.master_port}: {', '.join(jobs)}")


def select_device(name: str, env: DistEnv) -> torch.device:
    """The device of this rank; MissingError where a GPU is due and cannot be used: never a silent run on the CPU.

    NodeError where GPUs that Slurm allotted have gone, some of them or all.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        if name == "mps":
            raise MissingError("train.device=mps, but this machine has CUDA; use --device cuda")
        visible = torch.cuda.device_count()
        if visible not in (1, *range(env.local_world_size, 1025)):
            if _is_allotted(env.local_world_size, env):
                raise NodeError(
                    f"Slurm allotted {env.gpus_on_node} GPUs of {env.node}, but only {visible} answer there"
                )
            raise MissingError(f"{env.local_world_size} ranks on this node but {visible} GPUs; start one rank per GPU")
        device = torch.device("cuda", 0 if visible == 1 else env.local_rank)
        torch.cuda.set_device(device)
        return device
    if _is_allotted(1, env) and (why := _cuda_trouble()):
        raise NodeError(f"Slurm allotted {env.gpus_on_node} GPUs of {env.node}, but none answers there: {why}")
    if name == "cuda" or env.gpus_allotted:
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise MissingError(
            f"this job has GPUs or asks for them, but CUDA is not available to torch {torch.__version__} ({build}); "
            "install a CUDA build that fits the driver, or ask for the CPU with --device cpu"
        )
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if name == "mps":
        raise MissingError("train.device=mps, but there is no MPS device; use --device cpu")
    return torch.device("cpu")


def _is_allotted(gpus: int, env: DistEnv) -> bool:
    """Whether Slurm gave this node so many, and the user has hidden none of them from the ranks."""
    return (env.gpus_on_node or 0) >= gpus and (env.gpus_shown is None or env.gpus_shown >= gpus)


def _cuda_trouble() -> str | None:
    """Why CUDA does not start, where a node may be to blame for it: neither a CPU build is, nor one that is newer than the driver."""
    if torch.version.cuda is None:
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        said = next(iter(str(error).splitlines()), "")
        return None if "driver on your system is too old" in said else said
    return None


def make_deterministic() -> None:
    """Bit-identical results on CUDA: deterministic kernels, cuBLAS workspace, one NCCL algorithm."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)


def _meeting(env: DistEnv) -> dict[str, Any]:
    """Where the ranks meet: a file on this machine, nowhere for one alone, else as MASTER_ADDR and torchrun say."""
    if env.rendezvous:
        return {"store": FileStore(env.rendezvous, env.world_size)}
    if env.world_size == 1:
        return {"store": HashStore()}
    if not env.master_addr or not env.master_port:
        raise UsageError(
            f"{env.world_size} ranks but no MASTER_ADDR and MASTER_PORT in the environment; set them, or see slurm/"
        )
    if name := interface.towards(env.master_addr, env.master_port):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # torchrun may serve the store itself, which this knows
    store, _, _ = next(rendezvous("env://", env.rank, env.world_size, timeout=TIMEOUT))
    return {"store": store}


def _device_id(device: torch.device) -> dict[str, Any]:
    return {"device_id": device} if device.type == "cuda" else {}


def _die_with_launcher(env: DistEnv) -> None:
    """When the launcher is killed, its ranks get SIGTERM, save and stop, instead of living on unseen."""
    if env.launcher_pid is None or not sys.platform.startswith("linux"):
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
    if os.getppid() != env.launcher_pid:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)
