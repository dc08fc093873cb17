"""How fast the ranks talk to each other, and which node is to blame where that is too slow.

Rates are the bus bandwidth of nccl-tests, which does not depend on the number of ranks: bytes / time × 2 (n − 1) / n for an
all-reduce (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). GB are 10⁹ bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gpt2hpc.training.process_group import Ranks

CUDA_BYTES, CPU_BYTES = 1 << 28, 1 << 23
"""Of the message: as much as the gradients of a large model, or what a CPU sums in a blink."""
BUDGET_S, MAX_ROUNDS = 0.5, 20
CUDA_EXCHANGES, CPU_EXCHANGES = 3, 10
"""Of two ranks, of which the fastest counts: others may have been disturbed, on a CPU by all that it does besides."""
SLOW = 0.5
"""Of what the others reach: slower than that stands out."""

Pairs = Mapping[tuple[str, str], float]
"""GB/s between two nodes in one direction; between two ranks of one node where both names are the same."""


@dataclass(frozen=True)
class Slow:
    """What stands out: nodes that are slow with every partner, and pairs of nodes that are slow with each other only."""

    nodes: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


def all_reduce_gb_s(ranks: Ranks) -> float:
    """Bus bandwidth of an all-reduce over all ranks, as the slowest of them sees it; in about a second. Collective."""
    size = CUDA_BYTES if ranks.device.type == "cuda" else CPU_BYTES
    message = torch.zeros(size // 4, device=ranks.device)
    once = lambda: dist.all_reduce(message)  # noqa: E731
    _seconds(ranks, once)  # connects
    rounds = max(1, min(MAX_ROUNDS, int(BUDGET_S / _slowest(_seconds(ranks, once)))))
    seconds = _slowest(_seconds(ranks, once, rounds))
    return size / seconds * 2 * (ranks.world_size - 1) / ranks.world_size / 1e9


def pair_gb_s(ranks: Ranks, nodes: Sequence[str], beat: Callable[[], object] = lambda: None) -> Pairs:
    """Between each two nodes, and inside each node, as two ranks that exchange a message see it; collective.

    Args:
        ranks: This rank among its peers.
        nodes: The node of each rank.
        beat: Called in each round, of which there are about as many as nodes.
    """
    on_gpu = ranks.device.type == "cuda"
    size, times = (CUDA_BYTES // 4, CUDA_EXCHANGES) if on_gpu else (CPU_BYTES // 4, CPU_EXCHANGES)
    message, answer = (torch.zeros(size // 4, device=ranks.device) for _ in range(2))
    mine: dict[tuple[str, str], float] = {}
    for pairs in meetings(nodes):
        ranks.barrier()  # so that each pair waits for nobody else
        beat()
        partner = {**dict(pairs), **{second: first for first, second in pairs}}.get(ranks.rank)
        if partner is None:
            continue
        exchange = lambda partner=partner: _exchange(message, answer, partner=partner)  # noqa: E731
        _seconds(ranks, exchange)
        seconds = min(_seconds(ranks, exchange) for _ in range(times))
        first, second = sorted((ranks.rank, partner))
        mine[nodes[first], nodes[second]] = size / seconds / 1e9
    return {pair: rate for each in ranks.gather(mine) for pair, rate in each.items()}


def meetings(nodes: Sequence[str]) -> Iterator[list[tuple[int, int]]]:
    """Rounds of pairs of ranks: first two of each node, then a round-robin of the nodes, each of which meets each other once."""
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    yield [(found[0], found[1]) for found in members.values() if len(found) > 1]
    circle: list[int | None] = [found[0] for found in members.values()]
    if len(circle) % 2:
        circle.append(None)
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def standing_out(pairs: Pairs) -> Slow:
    """The nodes and pairs that are slower than half of what is usual between the others."""
    between = {pair: rate for pair, rate in pairs.items() if pair[0] != pair[1]}
    best: dict[str, float] = {}
    for pair, rate in between.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), rate)
    inside = {pair[0]: rate for pair, rate in pairs.items() if pair[0] == pair[1]}
    slow = {node for rates in (best, inside) if len(rates) > 2 for node in _below(rates)}
    usual = [rate for pair, rate in between.items() if not slow & set(pair)]
    left = [pair for pair, rate in between.items() if not slow & set(pair) and rate < SLOW * statistics.median(usual)]
    return Slow(tuple(sorted(slow)), tuple(sorted(left)))


def _below(rates: Mapping[str, float]) -> Iterator[str]:
    usual = statistics.median(rates.values())
    yield from (node for node, rate in rates.items() if rate < SLOW * usual)


def _exchange(message: torch.Tensor, answer: torch.Tensor, *, partner: int) -> None:
    ways = [dist.P2POp(dist.isend, message, partner), dist.P2POp(dist.irecv, answer, partner)]
    for work in dist.batch_isend_irecv(ways):
        work.wait()


def _seconds(ranks: Ranks, work: Callable[[], object], rounds: int = 1) -> float:
    """Of one round on this rank."""
    _finish(ranks)
    began = time.perf_counter()
    for _ in range(rounds):
        work()
    _finish(ranks)
    return max((time.perf_counter() - began) / rounds, 1e-9)


def _finish(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def _slowest(seconds: float) -> float:
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)
