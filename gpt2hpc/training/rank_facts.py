"""What each rank sees of its node, and what of that cannot be right: the judgement is a pure function of all ranks' facts."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2hpc import __version__
from gpt2hpc.cluster import file_system
from gpt2hpc.cluster.file_system import Mount
from gpt2hpc.data import manifest
from gpt2hpc.errors import DataError, Gpt2hpcError, MissingError, NodeError
from gpt2hpc.training.process_group import Ranks

HELD_SHARE, HELD_BYTES = 0.1, 1 << 30
"""Of a GPU's memory, that may be in use before anything is computed: drivers and our own contexts."""
SKEW_S = 2.0
_UNREADABLE = "nothing"


@dataclass(frozen=True)
class Gpu:
    """A rank's GPU."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int

    @property
    def kind(self) -> str:
        """With its memory: the same name is sold with several sizes."""
        return f"{self.name.removeprefix('NVIDIA ')} of {self.total_bytes / 2**30:.0f} GiB"


@dataclass(frozen=True)
class RankFacts:
    """What a rank sees.

    `data` identifies the bytes of the manifest, None where it is not on a disk of the nodes. The mounts are of the run directory and
    of the data. `trouble` is what CUDA said instead of facts of the GPU.
    """

    rank: int
    node: str
    version: str
    torch: str
    threads: int
    clock_s: float
    gpu: Gpu | None = None
    data: str | None = None
    run_mount: Mount | None = None
    data_mount: Mount | None = None
    trouble: str | None = None


@dataclass(frozen=True)
class Fault:
    """What is wrong, in words; `nodes` are to blame, none where the user is, who then gets an error of that `kind`."""

    text: str
    nodes: tuple[str, ...] = ()
    kind: type[Gpt2hpcError] = NodeError


def seen(ranks: Ranks, run: Path, data: Path | None) -> RankFacts:
    """By this rank, at this moment. `run` is the run directory, `data` the prepared one, if that is on a disk."""
    gpu, trouble = None, None
    try:
        gpu = _gpu(ranks.device, ranks.rank) if ranks.device.type == "cuda" else None
    except RuntimeError as error:  # of CUDA
        trouble = next(iter(str(error).splitlines()), "")
    return RankFacts(
        rank=ranks.rank,
        node=ranks.env.node,
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        clock_s=time.time(),
        gpu=gpu,
        data=None if data is None else _identity(data),
        run_mount=file_system.of(run),
        data_mount=None if data is None else file_system.of(data),
        trouble=trouble,
    )


def _gpu(device: torch.device, rank: int) -> Gpu:
    facts = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    uuid = str(getattr(facts, "uuid", f"rank{rank}"))  # which torch may not tell, and then none is taken for another's
    return Gpu(facts.name, uuid, total, free)


def _identity(data: Path) -> str:
    """Of the manifest's bytes; of names and sizes, where others have made the data and there is none."""
    try:
        if (path := data / manifest.NAME).exists():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        listed = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(data) if entry.is_file())
        return hashlib.sha256(repr(listed).encode()).hexdigest()
    except OSError as error:
        return f"{_UNREADABLE} ({error.strerror})"


def faults(facts: Sequence[RankFacts]) -> Iterator[Fault]:
    """All that cannot be right; those of the user's first, since they are not mended by other nodes."""
    yield from _versions(facts)
    yield from _shared_gpus(facts)
    yield from _held(facts)
    for each in facts:
        if each.trouble is not None:
            yield Fault(f"the GPU of rank {each.rank} on {each.node} does not work: {each.trouble}", (each.node,))
    yield from _data(facts)


def remarks(facts: Sequence[RankFacts]) -> Iterator[str]:
    """What is odd, but works."""
    kind = lambda each: each.gpu.kind if each.gpu else "no GPU"  # noqa: E731
    if len(set(map(kind, facts))) > 1:
        yield f"the nodes have different GPUs: {_listed(facts, kind)}; the slowest sets the pace, and a rank's bits depend on its kind"
    if len({each.threads for each in facts}) > 1:
        yield f"OMP_NUM_THREADS differs: {_listed(facts, lambda each: str(each.threads))}; on a CPU the slowest rank sets the pace"
    clocks = [each.clock_s for each in facts]
    if max(clocks) - min(clocks) > SKEW_S:
        behind = {each.node: each.clock_s - clocks[0] for each in facts if abs(each.clock_s - clocks[0]) > SKEW_S}
        told = ", ".join(f"{node} by {skew:+.1f} s" for node, skew in behind.items())
        yield f"clocks differ from that of {facts[0].node}: {told}; times in logs are not comparable"


def blamed(
    bad: Sequence[str], facts: Sequence[RankFacts], text: str, user: Fault, mount: Callable[[RankFacts], Mount | None]
) -> Fault:
    """A fault of the `bad` nodes, or the user's.

    The user's if it is so on every node but the first, and these are several, or if the `mount` of these nodes and of the first one
    is the same, and a node's own: nodes that lack a file system have another one in its place.
    """
    first = facts[0]
    others = {each.node for each in facts} - {first.node}
    own = mount(first)
    alike = own is not None and own.is_local and all(_is_same(mount(each), own) for each in facts)
    return user if set(bad) >= others and (alike or len(others) > 1) else Fault(text, tuple(bad))


def _is_same(one: Mount | None, other: Mount) -> bool:
    return one is not None and (one.where, one.kind) == (other.where, other.kind)


def _versions(facts: Sequence[RankFacts]) -> Iterator[Fault]:
    for name, value in (("gpt2hpc", lambda each: each.version), ("torch", lambda each: each.torch)):
        if len(set(map(value, facts))) > 1:
            mend = f"install one version of {name} on every node, or run all ranks in one image"
            yield Fault(
                f"the ranks have different versions of {name}: {_listed(facts, value)}; {mend}", kind=MissingError
            )


def _shared_gpus(facts: Sequence[RankFacts]) -> Iterator[Fault]:
    users: dict[tuple[str, str], list[int]] = {}
    for each in facts:
        if each.gpu:
            users.setdefault((each.node, each.gpu.uuid), []).append(each.rank)
    for (node, _), sharing in users.items():
        if len(sharing) > 1:
            told = " and ".join(map(str, sharing))
            yield Fault(
                f"ranks {told} have one GPU on {node}; ask for one GPU a rank, by --gpus-per-node", kind=MissingError
            )


def _held(facts: Sequence[RankFacts]) -> Iterator[Fault]:
    """Memory of a GPU that somebody else's process holds."""
    for each in facts:
        if (
            each.gpu
            and (held := each.gpu.total_bytes - each.gpu.free_bytes) > HELD_BYTES + HELD_SHARE * each.gpu.total_bytes
        ):
            free = f"{each.gpu.free_bytes / 2**30:.1f} of {each.gpu.total_bytes / 2**30:.1f} GiB"
            yield Fault(
                f"the GPU of rank {each.rank} on {each.node} has {free} free: another process holds {held / 2**30:.1f}; "
                "set --train.preflight thin where GPUs are shared on purpose",
                (each.node,),
            )


def _data(facts: Sequence[RankFacts]) -> Iterator[Fault]:
    bad = {each.node: each.data or "" for each in facts if each.data != facts[0].data}
    if bad:
        why = {node: found if found.startswith(_UNREADABLE) else "other data" for node, found in bad.items()}
        text = f"data.dir is not for all nodes what it is for {facts[0].node}: "
        text += ", ".join(f"{node} sees {reason}" for node, reason in why.items())
        mend = "put it on a file system that all nodes mount, at the same path"
        user = Fault(f"{text}; {mend}", kind=DataError)
        yield blamed(list(bad), facts, text, user, lambda each: each.data_mount)


def _listed(facts: Sequence[RankFacts], value: Callable[[RankFacts], str]) -> str:
    """`0.1.0 on n1, 0.2.0 on n2 and n3`."""
    where: dict[str, dict[str, None]] = {}
    for each in facts:
        where.setdefault(value(each), {})[each.node] = None
    return ", ".join(f"{found} on {' and '.join(nodes)}" for found, nodes in where.items())
