"""The tokens of each micro batch, memory-mapped, read ahead by one thread.

The global batch of a step is samples `consumed … consumed + G - 1` of the order; micro step m of rank r takes row
(m, r) of it laid out as (grad_accum_steps, world_size, micro_batch_size). Nothing depends on what was read before.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gpt2hpc.data import shards
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.order import Indices, Order
from gpt2hpc.data.shards import Split, Tokens
from gpt2hpc.errors import DataError

READ_AHEAD = 2


@dataclass(frozen=True)
class Slice:
    """Which part of a step's batch a rank computes."""

    rank: int
    world_size: int
    micro_batch_size: int
    grad_accum_steps: int

    @property
    def samples_per_step(self) -> int:
        return self.world_size * self.micro_batch_size * self.grad_accum_steps

    def micro_batch(self, consumed: int, micro_step: int) -> Indices:
        """Sample numbers, shaped (micro_batch_size,)."""
        start = consumed + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size, dtype=np.int64)


def check_data(manifest: Manifest, block_size: int) -> None:
    """Raise DataError unless every shard is there in its size and both splits hold a window. Costs one stat a shard."""
    for split in shards.SPLITS:
        Windows(manifest, split, block_size)
    for shard in manifest.shards:
        shards.check_size(manifest.directory / shard.file, shard)


class Windows:
    """Windows of `block_size` + 1 tokens of one split, by shard and number."""

    def __init__(self, manifest: Manifest, split: Split, block_size: int) -> None:
        self._manifest, self._block_size = manifest, block_size
        self._shards = manifest.split(split)
        self._open: dict[int, Tokens] = {}
        self.per_shard = [max(0, shard.tokens - 1) // block_size for shard in self._shards]
        if not sum(self.per_shard):
            raise DataError(
                f"data.dir={manifest.directory} has {manifest.tokens(split)} {split} tokens, too few for one window of "
                f"model.block_size={block_size} + 1; prepare more text"
            )

    def read(self, shard_numbers: Indices, window_numbers: Indices) -> Tokens:
        """Tokens shaped (windows, block_size + 1)."""
        out = np.empty((len(shard_numbers), self._block_size + 1), dtype=np.uint16)
        for row, (shard, window) in enumerate(zip(shard_numbers.tolist(), window_numbers.tolist(), strict=True)):
            start = window * self._block_size
            out[row] = self._tokens(shard)[start : start + self._block_size + 1]
        return out

    def _tokens(self, number: int) -> Tokens:
        if number not in self._open:
            shard = self._shards[number]
            self._open[number] = shards.open_shard(self._manifest.directory / shard.file, shard)
        return self._open[number]


class TrainLoader:
    """Training micro batches for one rank, for ever, from any position."""

    def __init__(self, manifest: Manifest, *, block_size: int, seed: int, shuffle_shards: int, part: Slice) -> None:
        self._windows = Windows(manifest, "train", block_size)
        self.order = Order(self._windows.per_shard, seed=seed, identity=manifest.sha256, group_shards=shuffle_shards)
        self.part = part

    def micro_batch(self, consumed: int, micro_step: int) -> Tokens:
        """Tokens shaped (micro_batch_size, block_size + 1)."""
        return self._windows.read(*self.order.locate(self.part.micro_batch(consumed, micro_step)))

    def stream(self, consumed: int) -> Iterator[Tokens]:
        """Every micro batch from `consumed` samples on; a thread reads READ_AHEAD of them ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as reader:
            ahead: collections.deque[Future[Tokens]] = collections.deque()
            for position in self._positions(consumed):
                ahead.append(reader.submit(self.micro_batch, *position))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()

    def _positions(self, consumed: int) -> Iterator[tuple[int, int]]:
        while True:
            yield from ((consumed, micro_step) for micro_step in range(self.part.grad_accum_steps))
            consumed += self.part.samples_per_step


class ValLoader:
    """The first windows of the validation split, the same ones for every world size."""

    def __init__(self, manifest: Manifest, *, block_size: int, tokens: int, part: Slice) -> None:
        self._windows = Windows(manifest, "val", block_size)
        self._part = part
        self._count = min(max(1, tokens // block_size), sum(self._windows.per_shard))
        self._starts = np.cumsum([0, *self._windows.per_shard])

    def __iter__(self) -> Iterator[tuple[Tokens, int]]:
        """Batches shaped (micro_batch_size, block_size + 1), and how many of their rows count.

        Every rank yields the same number of batches; those that do not divide are filled up with rows that do not count.
        """
        rows = self._part.micro_batch_size
        for start in range(0, self._count, rows * self._part.world_size):
            first = start + self._part.rank * rows
            numbers = np.minimum(np.arange(first, first + rows, dtype=np.int64), self._count - 1)
            shard_numbers = np.searchsorted(self._starts, numbers, side="right") - 1
            yield (
                self._windows.read(shard_numbers, numbers - self._starts[shard_numbers]),
                max(0, min(rows, self._count - first)),
            )
