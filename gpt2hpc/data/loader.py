"""The tokens of each micro batch, memory-mapped, read ahead by one thread.

The global batch of a step is samples `consumed … consumed + G - 1` of the order; micro step m of rank r takes row
(m, r) of it laid out as (grad_accum_steps, world_size, micro_batch_size). Nothing depends on what was read before.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.order import Indices, Order
from gpt2hpc.data.shards import SPLITS, Split, Tokens
from gpt2hpc.data.store import Store
from gpt2hpc.errors import DataError

READ_AHEAD = 2
"""Micro batches."""
LOCATED_AT_ONCE = 2048
"""Samples."""
STEPS_APART = READ_AHEAD + 2
"""Ranks leave a step together, but their readers are up to READ_AHEAD micro batches ahead of that."""


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


def check_windows(manifest: Manifest, block_size: int) -> None:
    """Raise DataError unless both splits hold a window."""
    for split in SPLITS:
        _per_shard(manifest, split, block_size)


def _per_shard(manifest: Manifest, split: Split, block_size: int) -> list[int]:
    """Windows in each shard of a split."""
    windows = [max(0, shard.tokens - 1) // block_size for shard in manifest.split(split)]
    if not sum(windows):
        raise DataError(
            f"data.dir={manifest.where} has {manifest.tokens(split)} {split} tokens, too few for one window of "
            f"model.block_size={block_size} + 1; prepare more text"
        )
    return windows


class Windows:
    """Windows of `block_size` + 1 tokens of one split, by shard and number."""

    def __init__(self, manifest: Manifest, store: Store, split: Split, block_size: int) -> None:
        self._store, self._block_size = store, block_size
        self.shards = manifest.split(split)
        self.per_shard = _per_shard(manifest, split, block_size)

    def read(self, shard_numbers: Indices, window_numbers: Indices) -> Tokens:
        """Tokens shaped (windows, block_size + 1)."""
        out = np.empty((len(shard_numbers), self._block_size + 1), dtype=np.uint16)
        for row, (shard, window) in enumerate(zip(shard_numbers.tolist(), window_numbers.tolist(), strict=True)):
            start = window * self._block_size
            tokens = self._store.tokens(self.shards[shard])
            out[row] = tokens[start : start + self._block_size + 1]
        return out


class TrainLoader:
    """Training micro batches for one rank, for ever, from any position."""

    def __init__(
        self, manifest: Manifest, store: Store, *, block_size: int, seed: int, shuffle_shards: int, part: Slice
    ) -> None:
        self._windows, self._store = Windows(manifest, store, "train", block_size), store
        self.order = Order(self._windows.per_shard, seed=seed, identity=manifest.sha256, group_shards=shuffle_shards)
        self.part = part
        largest = sorted(self._windows.shards, key=lambda shard: -shard.bytes)
        store.room_for(largest[: self._shards_at_a_time(shuffle_shards)])

    def _shards_at_a_time(self, shuffle_shards: int) -> int:
        """The most that may be read about the same time: whole groups of usual shards, at the seam of two or more."""
        usual = statistics.median(count for count in self._windows.per_shard if count) * shuffle_shards
        return shuffle_shards * (2 + int(2 * STEPS_APART * self.part.samples_per_step / usual))

    def micro_batch(self, consumed: int, micro_step: int) -> Tokens:
        """Tokens shaped (micro_batch_size, block_size + 1)."""
        return self._read(consumed, micro_step, *self.order.locate(self.part.micro_batch(consumed, micro_step)))

    def _read(self, consumed: int, micro_step: int, shards: Indices, windows: Indices) -> Tokens:
        if micro_step == 0:
            self._follow(consumed)
        return self._windows.read(shards, windows)

    def _follow(self, consumed: int) -> None:
        """Tell the store which shards the ranks of this node, some steps apart, read about now, and which come then."""
        apart = STEPS_APART * self.part.samples_per_step
        groups = self.order.groups(max(0, consumed - apart))
        now: list[int] = []
        for end, members in groups:
            now += members.tolist()
            if end >= consumed + apart:
                break
        shards = self._windows.shards
        self._store.follow(
            [shards[number] for number in now], (shards[number] for _, members in groups for number in members.tolist())
        )

    def stream(self, consumed: int) -> Iterator[Tokens]:
        """Every micro batch from `consumed` samples on; a thread reads READ_AHEAD of them ahead."""
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        ahead: collections.deque[Future[Tokens]] = collections.deque()
        try:
            for position in self._positions(consumed):
                ahead.append(reader.submit(self._read, *position))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()
        finally:
            with self._store.impatient():
                reader.shutdown(cancel_futures=True)

    def _positions(self, consumed: int) -> Iterator[tuple[int, int, Indices, Indices]]:
        """Samples consumed, micro step, and where the micro batch lies; located many at a time, since a few cost as much."""
        part = self.part
        steps = max(1, LOCATED_AT_ONCE // (part.micro_batch_size * part.grad_accum_steps))
        while True:
            positions = [
                (consumed + step * part.samples_per_step, micro_step)
                for step in range(steps)
                for micro_step in range(part.grad_accum_steps)
            ]
            located = self.order.locate(np.stack([part.micro_batch(*position) for position in positions]))
            yield from ((*position, *where) for position, *where in zip(positions, *located, strict=True))
            consumed += steps * part.samples_per_step


class ValLoader:
    """The first windows of the validation split, the same ones for every world size."""

    def __init__(self, manifest: Manifest, store: Store, *, block_size: int, tokens: int, part: Slice) -> None:
        self._windows = Windows(manifest, store, "val", block_size)
        self._part = part
        self._count = min(max(1, tokens // block_size), sum(self._windows.per_shard))
        self._starts = np.cumsum([0, *self._windows.per_shard])
        store.keep(
            [shard for shard, start in zip(self._windows.shards, self._starts, strict=False) if start < self._count]
        )

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
