"""What a start takes is told by phase, and kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.startup import SHOWN_S
from tests import tiny

pytestmark = pytest.mark.alone

PHASES = (
    *("imports", "device", "process group", "settings", "preflight", "data check"),
    *("checkpoint", "model", "warm-up", "logs", "validation", "first step"),
)


def test_a_start_is_told_by_phase(shared_data: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, began = RunDir(tmp_path / "run"), time.monotonic()
    settings = tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=2, options=["--slow-validation", "2"]) == 0
    took_s = time.monotonic() - began
    (attempt,) = Ledger(run).attempts()
    assert tuple(attempt.start_up) == PHASES
    assert attempt.start_up_s is not None
    assert attempt.start_up_s < took_s
    assert attempt.start_up["validation"] > 2
    assert attempt.start_up["imports"] > attempt.start_up["model"], "what torch imports late counts for the model"
    assert attempt.compile_cache is None
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("start-up: ")]
    assert len(lines) == 1
    assert f"{attempt.start_up_s:.1f} s" in lines[0]
    told = [part.rpartition(" ")[0] for part in lines[0].rpartition("was done: ")[2].split(", ")]
    assert told == [phase for phase in PHASES if attempt.start_up[phase] >= SHOWN_S]
