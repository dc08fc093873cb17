"""Other schedules, optimizers and reductions are as exact as the plain ones: three ranks, since two cannot show the trap."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc import starting
from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.errors import ConfigError
from gpt2hpc.run_dir import RunDir
from tests import tiny

RANKS = 3


def config(data: Manifest, *, optimizer: dict[str, Any], **train: Any) -> Config:
    """12 steps of two micro batches a rank, unless something else is said."""
    plain = tiny.config(data.where, tokens_per_step=192, **train)
    return dataclasses.replace(plain, optimizer=dataclasses.replace(plain.optimizer, **optimizer))


def test_a_run_with_wsd_is_lengthened_as_if_it_had_been_meant_so(
    shared_data: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped before its decay and lengthened, or lengthened from the checkpoint that was kept: the bytes of the long run."""
    optimizer = {"schedule": "wsd", "decay_share": 0.25}
    short, long = (config(shared_data, optimizer=optimizer, total_steps=steps) for steps in (8, 12))
    short = dataclasses.replace(short, checkpoint=dataclasses.replace(short.checkpoint, every_steps=None, keep_last=2))
    long = dataclasses.replace(long, checkpoint=short.checkpoint)
    whole, done, cut, taken = (RunDir(tmp_path / name) for name in ("whole", "done", "cut", "taken"))
    assert tiny.run_ranks(whole, long, nproc=RANKS) == 0
    expected = tiny.content(tiny.newest(whole))

    assert tiny.run_ranks(cut, short, nproc=RANKS, options=["--signal", "3", "0"]) == 0
    assert tiny.run_ranks(cut, long, nproc=RANKS, restart=1) == 0
    assert tiny.content(tiny.newest(cut)) == expected
    assert "the learning rate" not in capfd.readouterr().out

    assert tiny.run_ranks(done, short, nproc=RANKS) == 0
    kept = next(path for path in done.checkpoints.iterdir() if path.name.endswith("step0000006"))
    resumed = dataclasses.replace(long, checkpoint=dataclasses.replace(long.checkpoint, resume=str(kept)))
    assert tiny.run_ranks(taken, resumed, nproc=RANKS) == 0
    assert tiny.content(tiny.newest(taken)) == expected

    assert tiny.run_ranks(done, long, nproc=RANKS, restart=1) == 0
    assert tiny.content(tiny.newest(done)) != expected, "its decay is in it"
    assert "12 steps instead of 8 change the learning rate of step 9" in capfd.readouterr().out


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "muon": ({"name": "muon"}, {}, ()),
    "muon, wsd, fp16": ({"name": "muon", "schedule": "wsd"}, {"precision": "fp16"}, ("--loss-scale", str(2.0**26))),
    "bf16 reduction": ({}, {"reduce_dtype": "bf16"}, ()),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_stopped_and_resumed(variant: str, shared_data: Manifest, tmp_path: Path) -> None:
    optimizer, train, options = VARIANTS[variant]
    settings = config(shared_data, optimizer=optimizer, **train)
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    assert tiny.run_ranks(whole, settings, nproc=RANKS, options=options) == 0
    assert tiny.run_ranks(cut, settings, nproc=RANKS, options=[*options, "--signal", "4", "2"]) == 0
    assert tiny.newest(cut).step == 5
    without = tiny.copy_run(cut, tmp_path / "without")
    assert tiny.run_ranks(cut, settings, nproc=RANKS, restart=1, options=options) == 0
    expected = tiny.content(tiny.newest(whole))
    assert tiny.content(tiny.newest(cut)) == expected
    assert tiny.losses(cut) == tiny.losses(whole)
    if settings.train.precision != "fp16":  # in which so few bits are summed that it happens not to matter
        assert tiny.run_ranks(without, settings, nproc=RANKS, restart=1, options=["--without", "warm-up"]) == 0
        assert tiny.content(tiny.newest(without)) != expected, "the test would see it"


def test_another_optimizer_is_refused_by_name(
    shared_data: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the run itself, and where another one begins with its checkpoint."""
    adamw, muon = (config(shared_data, optimizer={"name": name}, total_steps=3) for name in ("adamw", "muon"))
    run = RunDir(tmp_path / "run")
    assert tiny.run_ranks(run, adamw, nproc=1) == 0
    with pytest.raises(ConfigError, match=r"optimizer.name=muon \(the run has adamw\)"):
        starting.check_start(run, muon, world_size=1)
    fork = dataclasses.replace(muon, checkpoint=dataclasses.replace(muon.checkpoint, resume=str(run.path)))
    assert tiny.run_ranks(RunDir(tmp_path / "fork"), fork, nproc=1) == 3
    assert "optimizer.name=muon (the checkpoint has adamw)" in capfd.readouterr().err


def test_gradients_in_bf16_are_those_of_fp32_but_for_their_last_bits(shared_data: Manifest, tmp_path: Path) -> None:
    """Two micro batches a rank: only their sum is rounded. The first loss is before any reduction."""
    losses = {}
    for dtype in ("fp32", "bf16"):
        run = RunDir(tmp_path / dtype)
        assert tiny.run_ranks(run, config(shared_data, optimizer={}, reduce_dtype=dtype), nproc=RANKS) == 0
        losses[dtype] = tiny.losses(run)
    assert losses["bf16"][1] == losses["fp32"][1]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=5e-3)
