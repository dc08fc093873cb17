"""Shards that come to the node's disk ahead of training and go behind it: the same samples as from the directory itself."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2hpc.config import DataConfig
from gpt2hpc.data import catalog, shards, store
from gpt2hpc.data.loader import Slice, TrainLoader, ValLoader
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.patience import HubDownError, LateError
from gpt2hpc.data.shards import Shard
from gpt2hpc.data.store import Directory, NodeCache
from gpt2hpc.errors import DataError
from tests import tiny

BLOCK = 16


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Nine training shards of different lengths."""
    return tiny.make_data(tmp_path_factory.mktemp("many"), shard_tokens=[700, 900, 500, 800, 17, 650, 900, 16, 450])


def cache(
    found: Manifest, directory: Path, *, budget: int, fetches: bool = True, patience_s: float = 10.0
) -> NodeCache:
    return NodeCache(
        store.fetch_from(found.where), directory, budget_bytes=budget, patience_s=patience_s, fetches=fetches
    )


def batches(found: Manifest, where: store.Store, part: Slice, consumed: int, steps: int, seed: int) -> list[bytes]:
    loader = TrainLoader(found, where, block_size=BLOCK, seed=seed, shuffle_shards=2, part=part)
    return [tokens.tobytes() for tokens in islice(loader.stream(consumed), steps * part.grad_accum_steps)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.sampled_from([1, 2, 3, 4]),
    accum=st.sampled_from([1, 2]),
    steps=st.integers(1, 60),
    consumed=st.integers(0, 700),
    seed=st.integers(0, 5),
    budget=st.integers(12_000, 40_000),
)
def test_a_stream_is_the_directory(
    many: Manifest,
    tmp_path_factory: pytest.TempPathFactory,
    world_size: int,
    accum: int,
    steps: int,
    consumed: int,
    seed: int,
    budget: int,
) -> None:
    """From any position, for any world size, with room for a few shards or all; every rank waits for one that fetches."""
    folder = tmp_path_factory.mktemp("cache")
    if world_size > 1:  # here no step is left together, so the rank that fetches may lead by the whole run
        budget = 1 << 30
    stores = [cache(many, folder, budget=budget, fetches=rank == 0) for rank in range(world_size)]
    parts = [Slice(rank, world_size, 2, accum) for rank in range(world_size)]
    found: list[list[bytes]] = [[] for _ in parts]

    def rank(number: int) -> None:
        found[number] = batches(many, stores[number], parts[number], consumed, steps, seed)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(1, world_size)]
    for thread in threads:
        thread.start()
    rank(0)
    for thread in threads:
        thread.join()
    for each in stores:
        each.close()
    assert found == [batches(many, Directory(Path(many.where)), part, consumed, steps, seed) for part in parts]


@settings(max_examples=30, deadline=None)
@given(
    windows=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    micro=st.sampled_from([1, 2, 4]),
    stop=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_ranks_are_disjoint_cover_the_epoch_once_and_resume(
    tmp_path_factory: pytest.TempPathFactory, windows: list[int], world_size: int, micro: int, stop: int, seed: int
) -> None:
    """Every window carries its own number, so that samples tell which they are."""
    folder, steps = tmp_path_factory.mktemp("data"), 0
    numbers = itertools.count()
    written = [shards.write_shard(folder, split="val", unit=99, documents=[np.zeros(BLOCK + 1, dtype=np.uint16)])]
    for unit, count in enumerate(windows):
        rows = [np.full(BLOCK, next(numbers), dtype=np.uint16) for _ in range(count)]
        written.append(
            shards.write_shard(folder, split="train", unit=unit, documents=[*rows, np.zeros(1, dtype=np.uint16)])
        )
    found = Manifest(str(folder), tuple(written), vocab_size=70_000)
    per_step, total = world_size * micro, sum(windows)
    steps = -(-2 * total // per_step)  # two epochs

    def stream(start: int, count: int) -> list[int]:
        """In the order of the run: step by step, rank by rank."""
        parts = [Slice(rank, world_size, micro, 1) for rank in range(world_size)]
        loaders = [
            TrainLoader(found, Directory(folder), block_size=BLOCK, seed=seed, shuffle_shards=2, part=part).stream(
                start * per_step
            )
            for part in parts
        ]
        return [int(row[0]) for _ in range(count) for loader in loaders for row in next(loader)]

    whole = stream(0, steps)
    for epoch in range(2):
        assert sorted(whole[epoch * total : (epoch + 1) * total]) == list(range(total))
    resumed_at = min(stop, steps)
    assert whole[: resumed_at * per_step] + stream(resumed_at, steps - resumed_at) == whole


# What the cache holds -----------------------------------------------------------------------------------------------


def size(directory: Path) -> int:
    """Of what lies there; files go while this looks."""
    total = 0
    for path in directory.glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_budget_is_kept_and_what_is_left_behind_goes(many: Manifest, tmp_path: Path) -> None:
    budget, largest = 9_000, 0
    where = cache(many, tmp_path, budget=budget)
    loader = TrainLoader(many, where, block_size=BLOCK, seed=1, shuffle_shards=2, part=Slice(0, 1, 1, 1))
    seen = set()
    for _ in islice(loader.stream(0), 300):
        seen |= {path.name for path in tmp_path.glob("[!.]*")}
        largest = max(largest, size(tmp_path))
    where.close()
    assert largest <= budget
    assert seen >= {shard.file for shard in many.split("train") if shard.tokens > BLOCK}


def test_shards_are_fetched_ahead(many: Manifest, tmp_path: Path) -> None:
    where = cache(many, tmp_path, budget=1 << 20)
    loader = TrainLoader(many, where, block_size=BLOCK, seed=1, shuffle_shards=2, part=Slice(0, 1, 1, 1))
    loader.micro_batch(0, 0)
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("*.npy"))) < len(many.split("train")) and time.monotonic() < deadline:
        time.sleep(0.01)
    where.close()
    assert len(list(tmp_path.glob("*.npy"))) == len(many.split("train"))


def test_what_validation_reads_stays(many: Manifest, tmp_path: Path) -> None:
    where = cache(many, tmp_path, budget=11_000)
    part = Slice(0, 1, 1, 1)
    validation = ValLoader(many, where, block_size=BLOCK, tokens=BLOCK * 5, part=part)
    first = [tokens.tobytes() for tokens, _ in validation]
    loader = TrainLoader(many, where, block_size=BLOCK, seed=1, shuffle_shards=2, part=part)
    for _ in islice(loader.stream(0), 200):
        assert (tmp_path / many.split("val")[0].file).exists()
    assert [tokens.tobytes() for tokens, _ in validation] == first
    where.close()


def test_a_shard_that_never_comes_is_said(many: Manifest, tmp_path: Path) -> None:
    where = cache(many, tmp_path, budget=1 << 20, fetches=False, patience_s=0.2)
    with pytest.raises(DataError, match=r"did not come within data.patience_s=0.2"):
        where.tokens(many.shards[1])


def test_a_shard_that_arrives_is_told(many: Manifest, tmp_path: Path) -> None:
    """Once each, so that several that come one after another are no hang."""
    told: list[int] = []
    where = NodeCache(
        store.fetch_from(many.where),
        tmp_path,
        budget_bytes=1 << 20,
        patience_s=10.0,
        fetches=True,
        arrived=lambda: told.append(len(told)),
    )
    shards = many.split("train")[:2]
    where.follow(shards, iter(()))
    for shard in [*shards, *shards]:
        where.tokens(shard)
    assert told == [0, 1]
    where.close()


def test_a_damaged_shard_is_not_copied(many: Manifest, tmp_path: Path) -> None:
    bad = dataclasses.replace(many.shards[1], sha256="0" * 64)
    where = cache(many, tmp_path, budget=1 << 20)
    where.follow([bad], iter(()))
    with pytest.raises(DataError, match="is damaged: its bytes are not those of the manifest"):
        where.tokens(bad)
    where.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said(many: Manifest, tmp_path: Path) -> None:
    def full(shard: Shard, target: Path) -> None:
        raise OSError(28, "No space left on device")

    where = NodeCache(full, tmp_path, budget_bytes=1 << 20, patience_s=10.0, fetches=True)
    where.follow([many.shards[1]], iter(()))
    with pytest.raises(DataError, match=r"No space left on device; free space, lower data\.cache_gib"):
        where.tokens(many.shards[1])
    where.close()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_failure_that_may_pass_is_not_the_users(many: Manifest, tmp_path: Path, number: int) -> None:
    """So that it ends the attempt alone."""

    def stale(shard: Shard, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    where = NodeCache(stale, tmp_path, budget_bytes=1 << 20, patience_s=10.0, fetches=True)
    where.follow([many.shards[1]], iter(()))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        where.tokens(many.shards[1])
    assert caught.value.errno == number
    where.close()


def test_a_size_that_the_disk_does_not_tell_is_not_a_missing_shard(
    many: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(OSError, match="Stale"):
        shards.check_size(Path(many.where) / many.shards[1].file, many.shards[1])


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_a_directory_is_said(many: Manifest, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        cache(many, tmp_path / place, budget=1 << 20)


def test_a_hub_that_is_down_is_waited_for(many: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_DOWN_S", 0.01)
    genuine, tries = store.fetch_from(many.where), itertools.count(1)

    def fetch(shard: Shard, target: Path) -> None:
        if next(tries) < 5:
            raise HubDownError("hf://datasets/some/data cannot be had: 503", "; try again later")
        genuine(shard, target)

    where = NodeCache(fetch, tmp_path, budget_bytes=1 << 20, patience_s=30.0, fetches=True)
    where.follow([many.shards[1]], iter(()))
    assert len(where.tokens(many.shards[1])) == many.shards[1].tokens
    assert next(tries) == 6
    where.close()


def test_a_hub_that_stays_down_is_said_in_the_end(many: Manifest, tmp_path: Path) -> None:
    def down(shard: Shard, target: Path) -> None:
        raise HubDownError("hf://datasets/some/data cannot be had: 503", "; try again later")

    where = NodeCache(down, tmp_path, budget_bytes=1 << 20, patience_s=0.5, fetches=True)
    where.follow([many.shards[1]], iter(()))
    with pytest.raises(
        LateError, match=r"data\.patience_s=0\.5 seconds \(hf://datasets/some/data cannot be had: 503\); raise"
    ):
        where.tokens(many.shards[1])
    began = time.monotonic()
    where.close()
    assert where._thread is not None
    where._thread.join(5)
    assert not where._thread.is_alive(), "it sleeps on"
    assert time.monotonic() - began < 5


def test_a_budget_that_would_not_do_later_is_refused_at_the_start(many: Manifest, tmp_path: Path) -> None:
    """Room for one group, but not for two where they meet."""
    where = cache(many, tmp_path, budget=5_000)
    with pytest.raises(DataError, match="shards that are read at a time"):
        TrainLoader(many, where, block_size=BLOCK, seed=1, shuffle_shards=2, part=Slice(0, 1, 1, 1))
    where.close()


def test_a_stop_does_not_wait_for_shards_that_will_not_come(many: Manifest, tmp_path: Path) -> None:
    """The rank that fetches may have left already: here only the first shard of the order is there."""
    where = cache(many, tmp_path, budget=1 << 20, fetches=False, patience_s=30)
    options = {"block_size": BLOCK, "seed": 1, "shuffle_shards": 1}
    order = TrainLoader(many, where, part=Slice(0, 1, 1, 1), **options).order
    first = order.locate(np.arange(1))[0][0]
    shard = many.split("train")[first]
    (tmp_path / shard.file).write_bytes((Path(many.where) / shard.file).read_bytes())
    whole_shard = Slice(0, 1, int(order.windows[first]), 1)
    stream = TrainLoader(many, where, part=whole_shard, **options).stream(0)
    assert len(next(stream)) == whole_shard.micro_batch_size
    time.sleep(0.5)  # its reader waits for the second shard by now
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 10


def test_what_is_deleted_comes_again(many: Manifest, tmp_path: Path) -> None:
    where = cache(many, tmp_path, budget=1 << 20)
    where.follow(many.split("train")[:1], iter(()))
    where.tokens(many.split("train")[0])
    (tmp_path / many.split("train")[0].file).unlink()
    where._open.clear()
    assert len(where.tokens(many.split("train")[0])) == many.split("train")[0].tokens
    where.close()


def test_abandoned_caches_go(many: Manifest, tmp_path: Path) -> None:
    sha = many.sha256[:16]
    for name in (f"gpt2hpc-1-{sha}", f"gpt2hpc-2-{sha}", "gpt2hpc-paper", "thesis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_000001.npy").write_bytes(b"x")
        if name != f"gpt2hpc-2-{sha}":
            os.utime(tmp_path / name, (0, 0))
    config = DataConfig(dir=many.where, stage=True, cache_dir=str(tmp_path))
    store.open_store(many, config, {}, job="7", fetches=True).remove()
    assert {path.name for path in tmp_path.iterdir()} == {f"gpt2hpc-2-{sha}", "gpt2hpc-paper", "thesis"}


def test_a_living_cache_says_so(many: Manifest, tmp_path: Path) -> None:
    """Everything may be there for days, so that nothing comes or goes."""
    where = cache(many, tmp_path, budget=1 << 20)
    where.follow(many.split("train"), iter(()))
    for shard in many.split("train"):
        where.tokens(shard)
    os.utime(tmp_path, (0, 0))
    deadline = time.monotonic() + 10
    while tmp_path.stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    where.close()
    assert tmp_path.stat().st_mtime > 1


def test_a_variable_that_is_not_set_is_no_directory(many: Manifest) -> None:
    config = DataConfig(dir=many.where, stage=True, cache_dir="$NOT_SET/x")
    with pytest.raises(DataError, match="names a variable that is not set"):
        store.open_store(many, config, {}, job="7", fetches=False)


def test_shards_without_hashes_are_told_apart_and_not_copied(tmp_path: Path) -> None:
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        np.save(
            tmp_path / str(seed) / "a_train_0.npy", np.random.default_rng(seed).integers(0, 99, 500, dtype=np.uint16)
        )
    found = [catalog.load(str(tmp_path / str(seed))) for seed in (1, 2)]
    assert found[0].sha256 != found[1].sha256
    config = DataConfig(dir=found[0].where, stage=True, cache_dir=str(tmp_path / "c"))
    with pytest.raises(DataError, match="has no hashes to compare copies with"):
        store.open_store(found[0], config, {}, job="7", fetches=False)


@pytest.mark.parametrize("stage", [False, True])
def test_the_settings_choose_the_store(many: Manifest, tmp_path: Path, stage: bool) -> None:
    config = DataConfig(dir=many.where, stage=stage, cache_dir=str(tmp_path / "c"))
    chosen = store.open_store(many, config, {}, job="7", fetches=False)
    assert isinstance(chosen, NodeCache if stage else Directory)
    assert (tmp_path / "c").exists() is stage


# Shards of others ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["npy", "bin"])
def of_others(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """As build-nanogpt's and llm.c's scripts write them."""
    source, arrays = np.random.default_rng(0), {}
    for name, count in {
        "edufineweb_val_000000": 200,
        "edufineweb_train_000001": 900,
        "edufineweb_train_000002": 300,
    }.items():
        arrays[name] = source.integers(0, 50_257, size=count, dtype=np.uint16)
        if request.param == "npy":
            np.save(tmp_path / name, arrays[name])
        else:
            header = np.zeros(256, dtype=np.int32)
            header[:3] = 20240520, 1, count
            (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + arrays[name].tobytes())
    (tmp_path / "README.md").write_text("train on this")
    return tmp_path, arrays


def test_shards_of_others_load(of_others: tuple[Path, dict[str, np.ndarray]]) -> None:
    directory, arrays = of_others
    found = catalog.load(str(directory))
    assert [(shard.split, shard.tokens) for shard in found.shards] == [("train", 900), ("train", 300), ("val", 200)]
    where = Directory(directory)
    for shard in found.shards:
        assert where.tokens(shard).tolist() == arrays[Path(shard.file).stem].tolist()
    loader = TrainLoader(found, where, block_size=BLOCK, seed=1, shuffle_shards=2, part=Slice(0, 1, 2, 1))
    assert loader.micro_batch(0, 0).shape == (2, BLOCK + 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a_train_0.bin", b"\0" * 2000, "has no header of llm.c's"),
        ("a_train_0.npy", b"nonsense" * 300, "is no .npy file"),
        ("other.bin", b"", "nor *_train_*.npy or .bin shards"),
    ],
)
def test_what_is_no_shard_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        catalog.load(str(tmp_path))
    assert words in str(refused.value)


def test_tokens_of_another_type_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a_train_0.npy", np.zeros(100, dtype=np.int32))
    with pytest.raises(DataError, match="holds int32"):
        catalog.load(str(tmp_path))
