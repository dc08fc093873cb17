"""Checkpoints: complete or absent, verified, and never code."""

from __future__ import annotations

import errno
import json
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from gpt2hpc import durable
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import CheckpointConfig, Config, ModelConfig, OptimizerConfig
from gpt2hpc.errors import ConfigError, RunDirError
from gpt2hpc.model.gpt import GPT
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, saver, shares, state, uploads
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.metrics import MetricsLog
from gpt2hpc.training.optimizer import new_optimizer
from gpt2hpc.training.process_group import Ranks, joined
from gpt2hpc.training.saver import Order, Saver
from gpt2hpc.training.saves import Saves
from gpt2hpc.training.stop import Clock

CPU = torch.device("cpu")
ALONE = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n1")
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=64, padded_vocab_size=64)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined(ALONE, CPU) as found:
        yield found


def save(
    directory: Path, step: int, ranks: Ranks, tensors: dict[str, torch.Tensor] | None = None, **more: Any
) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    target = directory / checkpoint.name(started="20260131-120000", tag="gpt2-124m-ctx1024", step=step)
    writer = Saver(ranks, attempt=1, fence=more.get("fence", lambda: None))
    tensors = tensors or {"model/a": torch.full((40, 50), float(step)), "model/b": torch.arange(7)}
    writer.begin(tensors, Order(target, state.rank_state(CPU), {"step": step}))
    writer.wait()
    return Checkpoint(target)


def test_name() -> None:
    assert (
        checkpoint.name(started="20260131-120000", tag="gpt2-124m-ctx1024", step=1000)
        == "20260131-120000_gpt2-124m-ctx1024_step0001000"
    )


def test_what_is_saved_is_read(tmp_path: Path, ranks: Ranks) -> None:
    saved = save(tmp_path, 7, ranks)
    assert saved.step == 7
    assert saved.damage() is None
    tensors = dict(saved.tensors())
    assert set(tensors) == {"model/a", "model/b"}
    assert torch.equal(tensors["model/a"], torch.full((40, 50), 7.0))
    assert [path.name for path in tmp_path.iterdir()] == [saved.path.name]


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-15] ^= 1
    path.write_bytes(content)


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_remove])
@pytest.mark.parametrize("name", ["state-00000-of-00001.safetensors", "rank-00000.safetensors", "manifest.json"])
def test_a_damaged_one_is_skipped_aloud(name: str, damage: Any, tmp_path: Path, ranks: Ranks) -> None:
    for step in (5, 10):
        save(tmp_path, step, ranks)
    newest = save(tmp_path, 15, ranks)
    damage(newest.path / name)
    said: list[str] = []
    found = checkpoint.newest_valid(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    assert len(said) == 1
    assert newest.path.name in said[0]


def test_a_manifest_that_the_disk_does_not_give_is_skipped_aloud(tmp_path: Path, ranks: Ranks) -> None:
    save(tmp_path, 10, ranks)
    unreadable = save(tmp_path, 20, ranks).path / checkpoint.MANIFEST
    unreadable.unlink()
    unreadable.mkdir()
    said: list[str] = []
    found = checkpoint.newest_valid(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    assert "manifest.json is missing or damaged" in said[0]


def test_a_leftover_is_never_loaded(tmp_path: Path, ranks: Ranks) -> None:
    saved = save(tmp_path, 5, ranks)
    shutil.copytree(saved.path, saved.path.with_name(saved.path.name.replace("0005", "0009") + ".tmp"))
    assert [found.step for found in checkpoint.found(tmp_path)] == [5]
    checkpoint.remove_unfinished(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_loaded_from_nowhere(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "absent", print) is None


def test_prune_keeps_the_last_and_the_one_resumed_from(tmp_path: Path, ranks: Ranks) -> None:
    first = save(tmp_path, 1, ranks)
    for step in (2, 3, 4, 5):
        save(tmp_path, step, ranks)
    checkpoint.prune(tmp_path, saved_step=5, config=CheckpointConfig(keep_last=2), keep=[first.path])
    assert [found.step for found in checkpoint.found(tmp_path)] == [5, 4, 1]


def test_every_so_many_are_kept_for_good() -> None:
    config = CheckpointConfig(keep_last=2, keep_every_steps=100)
    assert checkpoint.outdated({50, 100, 150, 200, 250, 300, 350}, config) == {50, 150, 250}
    assert checkpoint.outdated({50, 100}, config) == set()
    assert checkpoint.outdated({1, 2, 3}, CheckpointConfig(keep_last=2)) == {1}


def test_what_is_being_uploaded_is_kept(tmp_path: Path, ranks: Ranks) -> None:
    run = RunDir(tmp_path)
    first = save(run.checkpoints, 1, ranks)
    for step in (2, 3, 4):
        save(run.checkpoints, step, ranks)
    config = CheckpointConfig(keep_last=2)
    with uploads.lease(run, first):
        checkpoint.prune(run.checkpoints, saved_step=4, config=config, keep=uploads.leased(run))
        assert [found.step for found in checkpoint.found(run.checkpoints)] == [4, 3, 1]
    checkpoint.prune(run.checkpoints, saved_step=4, config=config, keep=uploads.leased(run))
    assert [found.step for found in checkpoint.found(run.checkpoints)] == [4, 3]


def test_a_training_keeps_what_it_resumed_from_and_what_is_being_uploaded(tmp_path: Path, ranks: Ranks) -> None:
    run = RunDir(tmp_path)
    run.create()
    ledger, config = Ledger(run), Config(checkpoint=CheckpointConfig(keep_last=2))
    attempt = ledger.claim(ALONE)
    first = save(run.checkpoints, 1, ranks)
    clock = Clock(config.checkpoint, None)
    saves = Saves(run, config, ranks=ranks, ledger=ledger, attempt=attempt, clock=clock, say=lambda text: None)
    saves.resumed(first, started="unused")
    log = MetricsLog(run, resumed_step=1, fence=lambda: None, say=lambda text: None)
    leased = None
    for step in (2, 3, 4, 5, 6):
        saves.begin(step, {"model/a": torch.ones(5)}, state.rank_state(CPU), {"step": step}, log)
        saves.settle(log)
        if leased is None:
            leased = uploads.lease(run, checkpoint.found(run.checkpoints)[0])
            leased.__enter__()
    leased.__exit__(None, None, None)
    log.close()
    assert [found.step for found in checkpoint.found(run.checkpoints)] == [6, 5, 2, 1]
    assert ledger.attempts()[-1].saved_step == 6


def test_the_space_is_checked(tmp_path: Path, ranks: Ranks) -> None:
    config = CheckpointConfig(keep_last=2)
    checkpoint.check_space(tmp_path, bytes_each=1000, config=config)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(
        RunDirError, match=r"has .* GB free, but checkpoints of .* free space, lower --checkpoint.keep_last"
    ):
        checkpoint.check_space(tmp_path, bytes_each=free // 2, config=config)


def test_the_one_resumed_from_needs_space_too(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays beside the last ones, and the one that is written."""
    there = save(tmp_path, 10, ranks)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(2.5 * size)))
    config = CheckpointConfig(keep_last=2)
    checkpoint.check_space(tmp_path, bytes_each=size, config=config)
    with pytest.raises(RunDirError, match=r"checkpoint\.keep_last=2, one being written and the one resumed from"):
        checkpoint.check_space(tmp_path, bytes_each=size, config=config, resumed=there)
    for_good = CheckpointConfig(keep_last=2, keep_every_steps=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * size))
    checkpoint.check_space(tmp_path, bytes_each=size, config=for_good, resumed=there)


def test_what_stays_for_good_makes_no_room(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, ranks)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.*") if path.is_file()) // 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    checkpoint.check_space(tmp_path, bytes_each=size - 500, config=CheckpointConfig(keep_last=2))
    with pytest.raises(RunDirError):
        checkpoint.check_space(tmp_path, bytes_each=size, config=CheckpointConfig(keep_last=2, keep_every_steps=10))


def test_the_one_from_before_the_decay_needs_space_too(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For itself as long as it is to come, and then it makes no room."""
    save(tmp_path, 10, ranks)
    save(tmp_path, 20, ranks)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.*") if path.is_file()) // 2
    config = CheckpointConfig(keep_last=2)

    def check(free: float, begins: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free * size)))
        checkpoint.check_space(tmp_path, bytes_each=size, config=config, decay_begins=begins)

    for begins in (30, 20):
        check(2.1, begins)
        with pytest.raises(RunDirError):
            check(1.9, begins)
    check(1.1, 15)  # which somebody has deleted
    with pytest.raises(
        RunDirError, match=r"checkpoint\.keep_last=2, one being written and the one from before the decay\)"
    ):
        check(1.1, 30)


def test_a_save_copies_before_it_returns(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps go on while it is written: what they change must not get into it."""
    may_write, genuine = threading.Event(), saver.durable.write_bytes

    def slow(path: Path, contents: bytes) -> None:
        assert may_write.wait(60)
        genuine(path, contents)

    monkeypatch.setattr(saver.durable, "write_bytes", slow)
    writer, tensors = Saver(ranks, attempt=1, fence=lambda: None), {"model/a": torch.ones(1000)}
    target = tmp_path / checkpoint.name(started="20260131-120000", tag="tiny", step=1)
    writer.begin(tensors, Order(target, state.rank_state(CPU), {"step": 1}))
    assert writer.is_saving
    assert not target.exists()
    tensors["model/a"].zero_()
    may_write.set()
    writer.wait()
    saved = writer.finished()
    assert saved is not None
    assert saved.bytes > 4000
    assert 0 < saved.stall_s < saved.seconds
    assert torch.equal(dict(saved.checkpoint.tensors())["model/a"], torch.ones(1000))


def test_the_wait_for_the_save_before_is_a_stall_too(tmp_path: Path, ranks: Ranks) -> None:
    writer = Saver(ranks, attempt=1, fence=lambda: None)
    target = tmp_path / checkpoint.name(started="20260131-120000", tag="tiny", step=1)
    writer.begin({"model/a": torch.ones(10)}, Order(target, state.rank_state(CPU), {"step": 1}), waited_s=7.0)
    writer.wait()
    saved = writer.finished()
    assert saved is not None
    assert saved.stall_s > 7.0 > saved.seconds, "and no part of how long a save takes"


def test_a_full_ledger_is_not_called_an_unwritten_checkpoint(tmp_path: Path, ranks: Ranks) -> None:
    def published(found: Checkpoint) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "attempts/0001.json")

    writer = Saver(ranks, attempt=1, fence=lambda: None)
    target = tmp_path / checkpoint.name(started="20260131-120000", tag="tiny", step=1)
    writer.begin({"model/a": torch.ones(10)}, Order(target, state.rank_state(CPU), {"step": 1}, published=published))
    with pytest.raises(RunDirError, match=r"is saved, but what is noted of it .* attempts/0001\.json: No space left"):
        writer.wait()
    assert Checkpoint(target).damage() is None


@pytest.mark.parametrize("dtype", list(saver._DTYPES), ids=str)
def test_the_image_is_a_safetensors_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """As the library reads it, in any mixture of sizes; and buffers are used again."""
    tensors = {
        "odd": torch.arange(7).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "byte": torch.arange(3, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "matrix": torch.arange(6.0).view(2, 3).t(),
    }
    image = saver.FileImage(tensors, pinned=False)
    for number in range(2):
        changed = {name: tensor + number if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        assert image.fits(changed)
        image.fill(changed)
        (tmp_path / "file").write_bytes(image.contents)
        found = safetensors.torch.load_file(tmp_path / "file")
        assert set(found) == set(changed)
        assert all(torch.equal(found[name], changed[name]) for name in changed)
    assert not image.fits({**tensors, "odd": torch.arange(8).to(dtype)})
    assert not image.fits({"odd": tensors["odd"]})


def test_prune_does_not_count_damaged_ones_ahead(tmp_path: Path, ranks: Ranks) -> None:
    """Skipped on resume, they have higher steps than what is saved after; that must not be what goes."""
    for step in (80, 85, 90, 100):
        save(tmp_path, step, ranks)
    checkpoint.prune(tmp_path, saved_step=85, config=CheckpointConfig(keep_last=2), keep=[])
    assert [found.step for found in checkpoint.found(tmp_path)] == [100, 90, 85, 80]


def test_a_zombies_files_are_left_alone(tmp_path: Path, ranks: Ranks) -> None:
    """Both attempts save the same step; neither may write into the other's unfinished directory."""
    name = checkpoint.name(started="20260131-120000", tag="gpt2-124m-ctx1024", step=5)
    other = tmp_path / f"{name}.0002.tmp"
    other.mkdir()
    (other / "state-00000-of-00001.safetensors").write_bytes(b"theirs")
    assert save(tmp_path, 5, ranks).damage() is None
    assert (other / "state-00000-of-00001.safetensors").read_bytes() == b"theirs"
    assert len(list(other.iterdir())) == 1


def test_a_damaged_one_is_written_again(tmp_path: Path, ranks: Ranks) -> None:
    saved = save(tmp_path, 5, ranks)
    damage_cut(saved.path / "manifest.json")
    assert save(tmp_path, 5, ranks).damage() is None


def test_the_fence_stops_publishing(tmp_path: Path, ranks: Ranks) -> None:
    calls = iter([None, RunDirError("superseded")])

    def fence() -> None:  # free at the beginning, superseded before the rename
        if error := next(calls):
            raise error

    with pytest.raises(RunDirError, match="superseded"):
        save(tmp_path, 5, ranks, fence=fence)
    assert checkpoint.found(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_what_was_there(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5, ranks)

    def full(path: Path, contents: bytes) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(contents)

    monkeypatch.setattr(saver.durable, "write_bytes", full)
    with pytest.raises(RunDirError, match=r"could not be written: .*No space left.*what was complete before is kept"):
        save(tmp_path, 10, ranks)
    found = checkpoint.newest_valid(tmp_path, print)
    assert found is not None
    assert found.step == 5


def test_a_disk_that_lies_is_caught_before_anything_is_pruned(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, ranks)
    genuine = saver.durable.write_bytes
    monkeypatch.setattr(saver.durable, "write_bytes", lambda path, contents: genuine(path, bytes(contents[:-1]) + b"?"))
    with pytest.raises(OSError, match="reads back differently"):
        save(tmp_path, 10, ranks)
    assert [found.step for found in checkpoint.found(tmp_path)] == [5]


def test_every_writer_gets_a_share() -> None:
    """Full tensors spread over the ranks, each in one file, evenly by bytes."""
    sizes = {f"t{size}": 4 * size for size in (100, 90, 50, 40, 20, 10, 5)}
    owners = shares.spread(sizes, 3)
    assert set(owners) == set(sizes)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 4 * 20
    assert shares.spread({"only": 12}, 4) == {"only": 0}


def trained(seed: int, steps: int) -> tuple[GPT, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = GPT(MODEL)
    optimizer = new_optimizer(model, OptimizerConfig())
    for _ in range(steps):
        tokens = torch.randint(0, 64, (2, 9))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_model_and_optimizer_survive(tmp_path: Path, ranks: Ranks) -> None:
    model, optimizer = trained(0, 3)
    saved = save(tmp_path, 3, ranks, state.state_tensors(model, optimizer))
    other, other_optimizer = trained(1, 1)
    state.load_model(other, saved.tensors("model/"))
    state.load_optimizer(other_optimizer, other, saved.tensors("optimizer/"))
    expected, found = state.state_tensors(model, optimizer), state.state_tensors(other, other_optimizer)
    assert set(expected) == set(found)
    assert len(expected) == 4 * len(list(model.parameters())), "weight, step and two moments each"
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert not [name for name in expected if "_orig_mod" in name or "module." in name]


def test_another_shape_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    saved = save(tmp_path, 3, ranks, state.state_tensors(*trained(0, 1)))
    wider = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=64, padded_vocab_size=64))
    with pytest.raises(ConfigError, match="use the settings it was trained with"):
        state.load_model(wider, saved.tensors("model/"))
    deeper = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, padded_vocab_size=64))
    with pytest.raises(ConfigError, match=r"lacks h\.1\."):
        state.load_model(deeper, saved.tensors("model/"))


def test_optimizer_state_of_another_shape_is_refused() -> None:
    """A fused step would follow the parameter's shape past the end of the state's memory."""
    tensors = state.state_tensors(*trained(0, 1))
    name = "optimizer/exp_avg/wte.weight"
    model, optimizer = trained(1, 1)
    for wrong, told in (
        ({**tensors, name: torch.zeros(1)}, "does not fit wte.weight"),
        ({**tensors, name.replace("exp_avg", "step"): torch.zeros(2)}, "optimizer/step/wte.weight of shape"),
        ({key: each for key, each in tensors.items() if not key.endswith("wpe.weight")}, "differ in wpe.weight"),
    ):
        only = [(key, each) for key, each in wrong.items() if key.startswith("optimizer/")]
        with pytest.raises(ConfigError, match=told):
            state.load_optimizer(optimizer, model, only)


HASH = {"bytes": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "wrong",
    [
        {"files": {"/dev/zero": HASH}},
        {"files": {"../other": HASH}},
        {"files": {"rank-00000.safetensors/../../x": HASH}},
        {"files": ["state-00000-of-00001.safetensors"]},
        {"files": {"metrics.jsonl": 7}},
        {"files": {}, "step": "5"},
        {"step": 6},
    ],
    ids=str,
)
def test_a_manifest_of_strangers_is_looked_at(wrong: dict[str, Any], tmp_path: Path, ranks: Ranks) -> None:
    """What it names lies in its directory, and its step is that of its name; it may well have a right hash of itself."""
    saved = save(tmp_path, 5, ranks)
    facts = {**saved.manifest(), **wrong}
    facts["sha256"] = checkpoint.facts_sha256(facts)
    (saved.path / "manifest.json").write_text(json.dumps(facts))
    assert saved.damage() == "manifest.json is missing or damaged"


def test_random_generators_survive(tmp_path: Path, ranks: Ranks) -> None:
    def draw() -> list[float]:
        return [
            random.gauss(0, 1),
            random.random(),
            float(np.random.normal()),
            float(np.random.rand()),
            torch.rand(()).item(),
        ]

    state.seed_rank(1, 2, 3)
    draw()  # leaves a cached Gaussian behind in Python and NumPy
    saved = save(tmp_path, 1, ranks)
    expected = draw()
    state.seed_rank(4, 5, 6)
    assert draw() != expected
    state.restore_rank_state(saved.rank_state(0), CPU)
    assert draw() == expected


def test_equal_states_are_equal_bytes(tmp_path: Path, ranks: Ranks) -> None:
    state.seed_rank(0, 0, 0)
    hashes = {
        json.dumps(save(tmp_path / str(number), 3, ranks).manifest()["files"], sort_keys=True) for number in range(5)
    }
    assert len(hashes) == 1


def test_a_rank_without_a_share_writes_an_empty_file(tmp_path: Path) -> None:
    names = [f"state-0000{rank}-of-00002.safetensors" for rank in range(2)]
    for name, tensors in zip(names, ({"model/a": torch.ones(2)}, {}), strict=True):
        safetensors.torch.save_file(tensors, tmp_path / name)
    facts = {"step": 1, "files": {name: {"bytes": 0, "sha256": ""} for name in names}}
    durable.publish_json(tmp_path / checkpoint.MANIFEST, {**facts, "sha256": checkpoint.facts_sha256(facts)})
    assert list(dict(Checkpoint(tmp_path).tensors())) == ["model/a"]


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path, ranks: Ranks) -> None:
    """It lies there of a checkpoint that other ranks wrote, after a copy that deletes nothing, say."""
    saved = save(tmp_path, 7, ranks, {"model/a": torch.ones(2)})
    for rank in range(2):
        safetensors.torch.save_file({"model/a": torch.zeros(2)}, saved.path / f"state-0000{rank}-of-00002.safetensors")
    assert saved.damage() is None
    assert [(name, tensor.tolist()) for name, tensor in saved.tensors()] == [("model/a", [1.0, 1.0])]
