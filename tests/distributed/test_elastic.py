"""Another number of processes at each start: the same tokens in the same order, and the loss goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gpt2hpc.data.loader import Slice
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny

SAMPLES = 16
"""Of a step: 256 tokens in windows of 16."""


def traced(run: RunDir) -> dict[tuple[int, int, int, int], list[int]]:
    """Samples by (step, world size, rank, micro step); what a dead attempt did beyond its checkpoint counts once."""
    found = {}
    for path in sorted((run.path / "trace").iterdir()):
        rank = int(path.stem.removeprefix("rank"))
        for line in path.read_text().splitlines():
            facts = json.loads(line)
            found[facts["step"], facts["world_size"], rank, facts["micro_step"]] = facts["samples"]
    return found


def test_two_then_four_then_one(shared_data: Manifest, tmp_path: Path) -> None:
    settings = tiny.config(shared_data.where, trace_data=True)
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    assert tiny.run_ranks(whole, settings, nproc=2) == 0
    assert tiny.run_ranks(run, settings, nproc=2, options=["--signal", "3", "1"]) == 0
    assert tiny.run_ranks(run, settings, nproc=4, restart=1, options=["--signal", "7", "2"]) == 0
    assert tiny.run_ranks(run, settings, nproc=1, restart=2) == 0

    samples = traced(run)
    worlds = {step: world for step, world, _, _ in samples}
    assert worlds == {step: 2 if step <= 4 else 4 if step <= 8 else 1 for step in range(1, 13)}
    for (step, world, rank, micro_step), numbers in samples.items():
        part = Slice(rank, world, 2, SAMPLES // (2 * world))
        assert numbers == part.micro_batch((step - 1) * SAMPLES, micro_step).tolist()
    for step in range(1, 13):
        numbers = sorted(number for key, found in samples.items() if key[0] == step for number in found)
        assert numbers == list(range((step - 1) * SAMPLES, step * SAMPLES))


def test_the_loss_goes_on(shared_data: Manifest, tmp_path: Path) -> None:
    """Without dropout, whose draws belong to a rank, only the order of float sums differs between world sizes."""
    base = tiny.config(shared_data.where)
    settings = tiny.dataclasses.replace(base, model=tiny.dataclasses.replace(base.model, dropout=0.0))
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    assert tiny.run_ranks(whole, settings, nproc=2) == 0
    assert tiny.run_ranks(run, settings, nproc=2, options=["--signal", "3", "1"]) == 0
    assert tiny.run_ranks(run, settings, nproc=1, restart=1) == 0
    for kind in ("train", "val"):
        expected, found = tiny.losses(whole, kind), tiny.losses(run, kind)
        assert expected.keys() == found.keys()
        assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-4)
    assert not np.allclose(*(list(tiny.losses(run).values())[start : start + 4] for start in (0, 4)), atol=1e-4)
