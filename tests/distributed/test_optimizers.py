"""Other schedules, optimizers and reductions are as exact as the plain ones: three ranks, since two cannot show the trap."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
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
