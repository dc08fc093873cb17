"""The order of training samples as a pure function of (seed, epoch, manifest, sample number).

A sample is a window of T + 1 tokens inside one shard. An epoch permutes the shards, groups K of them in a row, and
permutes the windows of each group by a Feistel network with cycle walking (Black & Rogaway 2002, "Ciphers with
Arbitrary Finite Domains"): no table of N entries, and any sample number is found in constant time. So a restart needs
only the count of samples consumed, and any number of ranks sees the same samples in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 6


class Order:
    """Maps sample numbers to (shard, window).

    Args:
        windows: Windows in each shard, in the manifest's order.
        seed: Of the permutation.
        identity: The manifest's sha256: other data, another order.
        group_shards: K, the shards whose windows are shuffled together.
    """

    def __init__(self, windows: Sequence[int], *, seed: int, identity: str, group_shards: int) -> None:
        self.windows = np.asarray(windows, dtype=np.int64)
        self.per_epoch = int(self.windows.sum())
        self._seed, self._identity, self._group_shards = seed, identity, group_shards

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """Shard and window of each sample number, both shaped as `samples`; numbers past an epoch begin the next."""
        shards, windows = np.empty_like(samples), np.empty_like(samples)
        epochs, within = np.divmod(samples, self.per_epoch)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], windows[chosen] = self._locate_in_epoch(int(epoch), within[chosen])
        return shards, windows

    def groups(self, sample: int) -> Iterator[tuple[int, Indices]]:
        """The groups of shards from that of `sample` on, for ever: the sample number at which each ends, and its shards."""
        for epoch in itertools.count(sample // self.per_epoch):
            shard_order, group_ends = self._layout(epoch)
            for group, end in enumerate(group_ends.tolist()):
                if epoch * self.per_epoch + end > sample:
                    members = shard_order[group * self._group_shards : (group + 1) * self._group_shards]
                    yield epoch * self.per_epoch + end, members

    def _locate_in_epoch(self, epoch: int, samples: Indices) -> tuple[Indices, Indices]:
        shard_order, group_ends = self._layout(epoch)
        groups = np.searchsorted(group_ends, samples, side="right")
        shards, windows = np.empty_like(samples), np.empty_like(samples)
        for group in np.unique(groups):
            chosen = groups == group
            members = shard_order[group * self._group_shards : (group + 1) * self._group_shards]
            ends = np.cumsum(self.windows[members])
            start = int(group_ends[group]) - int(ends[-1])
            shuffled = permute(samples[chosen] - start, int(ends[-1]), self._keys(epoch, f"group {group}"))
            member = np.searchsorted(ends, shuffled, side="right")
            shards[chosen] = members[member]
            windows[chosen] = shuffled - (ends - self.windows[members])[member]
        return shards, windows

    @functools.lru_cache(maxsize=4)  # noqa: B019 -- an Order lives as long as its run
    def _layout(self, epoch: int) -> tuple[Indices, Indices]:
        """The epoch's order of shards, and where each group of them ends, in samples."""
        count = len(self.windows)
        shard_order = permute(np.arange(count, dtype=np.int64), count, self._keys(epoch, "shards"))
        ends = np.cumsum(self.windows[shard_order])
        last = np.minimum(np.arange(self._group_shards, count + self._group_shards, self._group_shards), count) - 1
        return shard_order, ends[last]

    def _keys(self, epoch: int, purpose: str) -> npt.NDArray[np.uint64]:
        text = f"{self._seed}/{self._identity}/{epoch}/{purpose}"
        return np.frombuffer(hashlib.sha512(text.encode()).digest(), dtype="<u8")[:_ROUNDS]


def permute(values: Indices, size: int, keys: npt.NDArray[np.uint64]) -> Indices:
    """A keyed permutation of 0 … size - 1, applied to `values`; `keys` holds one number a round."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = values.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():  # the network permutes the next power of four; walk until inside
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[outside] = left << half | right
        outside = out >= size
    return out.astype(np.int64)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators")."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
