from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2hpc.data import catalog
from gpt2hpc.data.loader import Slice, TrainLoader, ValLoader, Windows, check_windows
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.order import Order, permute
from gpt2hpc.data.store import Directory
from gpt2hpc.errors import DataError
from tests import tiny

BLOCK = 16


def where(found: Manifest) -> Directory:
    return Directory(Path(found.where))


@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    keys = np.arange(key, key + 6, dtype=np.uint64)
    assert sorted(permute(np.arange(size), size, keys)) == list(range(size))


@given(
    windows=st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(sum),
    seed=st.integers(0, 100),
    group=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_sees_each_window_once(windows: list[int], seed: int, group: int, epoch: int) -> None:
    order = Order(windows, seed=seed, identity="x", group_shards=group)
    start = epoch * order.per_epoch
    found = zip(*order.locate(np.arange(start, start + order.per_epoch)), strict=True)
    expected = [(shard, window) for shard, count in enumerate(windows) for window in range(count)]
    assert sorted((int(shard), int(window)) for shard, window in found) == expected


def test_order_depends_on_seed_epoch_and_data() -> None:
    def sequence(seed: int = 0, identity: str = "x", start: int = 0) -> list[tuple[int, int]]:
        order = Order([100, 100, 100], seed=seed, identity=identity, group_shards=2)
        return list(zip(*(part.tolist() for part in order.locate(np.arange(start, start + 300))), strict=True))

    sequences = [sequence(), sequence(seed=1), sequence(identity="y"), sequence(start=300)]
    assert len({tuple(each) for each in sequences}) == 4
    assert sequence() == sequence()


def test_order_is_frozen() -> None:
    """Another order would silently change every run that is resumed with a newer version."""
    order = Order([5, 7, 3], seed=1337, identity="abc", group_shards=2)
    shards, windows = order.locate(np.arange(20))
    assert shards.tolist() == FROZEN_SHARDS
    assert windows.tolist() == FROZEN_WINDOWS


FROZEN_SHARDS = [0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 2]
FROZEN_WINDOWS = [4, 4, 2, 6, 1, 5, 3, 1, 0, 0, 2, 3, 2, 1, 0, 4, 2, 0, 3, 2]


def test_groups_keep_to_few_shards() -> None:
    order = Order([50] * 8, seed=3, identity="x", group_shards=2)
    shards, _ = order.locate(np.arange(400))
    for start in range(0, 400, 100):
        assert len(set(shards[start : start + 100].tolist())) == 2


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    micro_batch_size=st.sampled_from([1, 2]),
    steps=st.integers(1, 5),
    consumed=st.integers(0, 2000),
)
def test_any_world_size_sees_the_same_batches(
    shared_data: Manifest, world_size: int, micro_batch_size: int, steps: int, consumed: int
) -> None:
    """Twenty-four samples a step, whoever computes them; none twice, none left out, from any position."""

    def batches(world_size: int, micro_batch_size: int) -> list[list[bytes]]:
        accum = 24 // (world_size * micro_batch_size)
        found: list[list[bytes]] = [[] for _ in range(steps)]
        for rank in range(world_size):
            part = Slice(rank, world_size, micro_batch_size, accum)
            loader = TrainLoader(shared_data, where(shared_data), block_size=BLOCK, seed=1, shuffle_shards=2, part=part)
            for number, tokens in enumerate(islice(loader.stream(consumed), steps * accum)):
                found[number // accum] += [row.tobytes() for row in tokens]
        return [sorted(batch) for batch in found]

    assert batches(world_size, micro_batch_size) == batches(1, 24)


def test_windows_overlap_by_their_target_only(shared_data: Manifest) -> None:
    windows = Windows(shared_data, where(shared_data), "train", BLOCK)
    first = np.load(Path(shared_data.where) / shared_data.split("train")[0].file)
    two = windows.read(np.array([0, 0]), np.array([0, 1]))
    assert two.shape == (2, BLOCK + 1)
    assert two[0].tolist() == first[: BLOCK + 1].tolist()
    assert two[1].tolist() == first[BLOCK : 2 * BLOCK + 1].tolist()
    last = windows.per_shard[0] - 1
    assert windows.read(np.array([0]), np.array([last])).shape == (1, BLOCK + 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_validation_is_the_same_for_every_world_size(shared_data: Manifest, world_size: int) -> None:
    found: list[bytes] = []
    counts = []
    for rank in range(world_size):
        loader = ValLoader(
            shared_data, where(shared_data), block_size=BLOCK, tokens=BLOCK * 23, part=Slice(rank, world_size, 4, 1)
        )
        batches = list(loader)
        counts.append(len(batches))
        assert all(tokens.shape == (4, BLOCK + 1) for tokens, _ in batches)
        found += [row.tobytes() for tokens, rows in batches for row in tokens[:rows]]
    assert len(set(counts)) == 1, "ranks must take part in the same number of steps"
    every = np.load(Path(shared_data.where) / shared_data.split("val")[0].file)
    assert sorted(found) == sorted(every[at * BLOCK : at * BLOCK + BLOCK + 1].tobytes() for at in range(23))


def test_too_little_data_is_said(tmp_path: Path) -> None:
    found = tiny.make_data(tmp_path, shard_tokens=[5])
    with pytest.raises(DataError, match="has 5 train tokens, too few"):
        check_windows(found, BLOCK)
    assert catalog.load(str(tmp_path)) == found
