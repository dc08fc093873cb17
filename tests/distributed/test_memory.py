"""What saves memory changes no bit: blocks that are computed again, and an optimizer whose state is spread over the ranks."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny

RANKS = 3
"""With two, gradients are summed in any order to the same bits."""


def settings_with(data: Manifest, **train: Any) -> Config:
    """12 steps with dropout, two micro batches each on three ranks."""
    return tiny.config(data.where, **{"tokens_per_step": 192, **train})


@pytest.fixture(scope="module")
def plain(shared_data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("plain") / "run")
    assert tiny.run_ranks(run, settings_with(shared_data), nproc=RANKS, options=["--state-bytes"]) == 0
    return run


def state_bytes(run: RunDir) -> list[int]:
    """Of each rank, what its optimizer held in memory at the end."""
    return [int((run.path / f"state-bytes-{rank}").read_text()) for rank in range(RANKS)]


def tensors(run: RunDir) -> dict[str, torch.Tensor]:
    return dict(tiny.newest(run).tensors())


def assert_same(one: RunDir, other: RunDir) -> None:
    """Bytes of weights and optimizer, generators of all ranks, and every loss."""
    mine, others = tensors(one), tensors(other)
    assert mine.keys() == others.keys()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
    hashes = [
        {name: digest for name, digest in tiny.content(tiny.newest(run))["files"].items() if name.startswith("rank-")}
        for run in (one, other)
    ]
    assert hashes[0] == hashes[1]
    for kind in ("train", "val"):
        assert tiny.losses(one, kind) == tiny.losses(other, kind)


def test_activation_checkpointing(plain: RunDir, shared_data: Manifest, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert tiny.run_ranks(run, settings_with(shared_data, activation_checkpointing=True), nproc=RANKS) == 0
    assert tiny.content(tiny.newest(run)) == tiny.content(tiny.newest(plain))
    assert_same(run, plain)


def test_sharded_optimizer(plain: RunDir, shared_data: Manifest, tmp_path: Path) -> None:
    """Stopped, resumed without it, stopped, and resumed with it again: the bytes of a run that never heard of it."""
    run, cut = RunDir(tmp_path / "run"), RunDir(tmp_path / "cut")
    sharded, whole = settings_with(shared_data, shard_optimizer=True), settings_with(shared_data)
    assert tiny.run_ranks(run, sharded, nproc=RANKS, options=["--state-bytes"]) == 0
    assert_same(run, plain)
    all_of_it = state_bytes(plain)[0]
    assert sum(state_bytes(run)) == all_of_it, "each is held once"
    assert max(state_bytes(run)) < 0.4 * all_of_it, "by a third of it each"
    assert tiny.run_ranks(cut, sharded, nproc=RANKS, options=["--signal", "3", "1"]) == 0
    assert tiny.run_ranks(cut, whole, nproc=RANKS, restart=1, options=["--signal", "7", "2"]) == 0
    assert tiny.run_ranks(cut, sharded, nproc=RANKS, restart=2, options=["--state-bytes"]) == 0
    assert state_bytes(cut) == state_bytes(run)
    assert tiny.content(tiny.newest(cut)) == tiny.content(tiny.newest(run))


def test_sharded_on_other_numbers_of_ranks(shared_data: Manifest, tmp_path: Path) -> None:
    """3 → 1 → 2 ranks, without dropout, whose draws belong to a rank: the curve of a run on 3 without it."""
    base = settings_with(shared_data, shard_optimizer=True)
    sharded = dataclasses.replace(base, model=dataclasses.replace(base.model, dropout=0.0))
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    without = dataclasses.replace(sharded, train=dataclasses.replace(sharded.train, shard_optimizer=False))
    assert tiny.run_ranks(whole, without, nproc=3) == 0
    assert tiny.run_ranks(run, sharded, nproc=3, options=["--signal", "3", "1"]) == 0
    assert tiny.run_ranks(run, sharded, nproc=1, restart=1, options=["--signal", "7", "0"]) == 0
    assert tiny.run_ranks(run, sharded, nproc=2, restart=2) == 0
    assert len(list(tiny.newest(run).path.glob("state-*"))) == 2
    assert list(tiny.losses(run).values()) == pytest.approx(list(tiny.losses(whole).values()), abs=1e-4)


def test_sharded_with_a_loss_scale(shared_data: Manifest, tmp_path: Path) -> None:
    """fp16, emulated on the CPU: a step that overflows is passed over by every rank, whosoever's gradients it were."""
    plain, sharded = RunDir(tmp_path / "plain"), RunDir(tmp_path / "sharded")
    scale = ("--loss-scale", str(2.0**26))
    for run, shard_optimizer in ((plain, False), (sharded, True)):
        settings = settings_with(shared_data, precision="fp16", shard_optimizer=shard_optimizer)
        assert tiny.run_ranks(run, settings, nproc=RANKS, options=scale) == 0
    assert tiny.newest(sharded).manifest()["scaler"] == tiny.newest(plain).manifest()["scaler"]
    assert tiny.newest(sharded).manifest()["scaler"]["scale"] < 2.0**26, "no overflow, so the test shows nothing"
    assert_same(sharded, plain)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which this machine lacks")
def test_activation_checkpointing_compiled(shared_data: Manifest, tmp_path: Path) -> None:
    """With dropout: the curve of a compiled run without it, and exact continuation."""
    plain, run, cut = (RunDir(tmp_path / name) for name in ("plain", "run", "cut"))
    settings = settings_with(shared_data, compile=True, activation_checkpointing=True)
    without = dataclasses.replace(settings, train=dataclasses.replace(settings.train, activation_checkpointing=False))
    assert tiny.run_ranks(plain, without, nproc=RANKS) == 0
    assert tiny.run_ranks(run, settings, nproc=RANKS) == 0
    assert list(tiny.losses(run).values()) == pytest.approx(list(tiny.losses(plain).values()), abs=1e-4)
    assert tiny.run_ranks(cut, settings, nproc=RANKS, options=["--signal", "4", "1"]) == 0
    assert tiny.run_ranks(cut, settings, nproc=RANKS, restart=1) == 0
    assert tiny.content(tiny.newest(cut)) == tiny.content(tiny.newest(run))
