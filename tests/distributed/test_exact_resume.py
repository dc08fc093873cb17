"""A stopped or killed run that goes on ends with the very bytes of one that was never disturbed.

Four ranks, since two cannot show the trap: with two, gradients are summed in any order to the same bits.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny

RANKS = 4


@pytest.fixture(scope="module")
def settings(shared_data: Manifest) -> Config:
    return tiny.config(shared_data.where)


@pytest.fixture(scope="module")
def undisturbed(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("undisturbed") / "run")
    assert tiny.run_ranks(run, settings, nproc=RANKS) == 0
    return run


@pytest.fixture(scope="module")
def stopped(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Rank 2 got SIGTERM in step 4; all saved at the agreed step."""
    run = RunDir(tmp_path_factory.mktemp("stopped") / "run")
    assert tiny.run_ranks(run, settings, nproc=RANKS, options=["--signal", "4", "2"]) == 0
    return run


def resume(run: RunDir, settings: Config, *options: str) -> dict[str, object]:
    assert tiny.run_ranks(run, settings, nproc=RANKS, restart=1, options=options) == 0
    assert run.finished.exists()
    return tiny.content(tiny.newest(run))


def test_stop_saves_at_an_agreed_step(stopped: RunDir) -> None:
    assert tiny.newest(stopped).step == 5
    assert not stopped.finished.exists()


def test_stopped_and_resumed(undisturbed: RunDir, stopped: RunDir, settings: Config, tmp_path: Path) -> None:
    run = tiny.copy_run(stopped, tmp_path / "run")
    assert resume(run, settings) == tiny.content(tiny.newest(undisturbed))
    assert tiny.losses(run) == tiny.losses(undisturbed)
    assert tiny.losses(run, "val") == tiny.losses(undisturbed, "val")


def test_killed_and_resumed(undisturbed: RunDir, settings: Config, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert tiny.run_ranks(run, settings, nproc=RANKS, options=["--kill", "8", "3"]) == 137
    assert tiny.newest(run).step == 6, "survivors must not save"
    survivor = run.rank_log("tiny", 0, 1).read_text()
    assert "lost a peer and ends without saving" in survivor
    assert "Traceback" not in survivor
    assert resume(run, settings) == tiny.content(tiny.newest(undisturbed))


@pytest.mark.parametrize("safeguard", ["warm-up", "rng"])
def test_negative_control(
    safeguard: str, undisturbed: RunDir, stopped: RunDir, settings: Config, tmp_path: Path
) -> None:
    """Without the safeguard the bytes differ, so the tests above can see it."""
    run = tiny.copy_run(stopped, tmp_path / "run")
    assert resume(run, settings, "--without", safeguard) != tiny.content(tiny.newest(undisturbed))


def test_loss_scale_is_state(shared_data: Manifest, tmp_path: Path) -> None:
    """fp16, emulated on the CPU: the scale has been halved by overflows and grown again by step 5."""
    settings = tiny.config(shared_data.where, precision="fp16")
    scale = ("--loss-scale", str(2.0**26))
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    assert tiny.run_ranks(whole, settings, nproc=RANKS, options=scale) == 0
    assert tiny.run_ranks(cut, settings, nproc=RANKS, options=[*scale, "--signal", "4", "0"]) == 0
    assert tiny.newest(cut).manifest()["scaler"]["scale"] != 2.0**26, "no overflow, so the test would show nothing"
    without = tiny.copy_run(cut, tmp_path / "without")
    expected = tiny.content(tiny.newest(whole))
    assert resume(cut, settings, *scale) == expected
    assert resume(without, settings, *scale, "--without", "scaler") != expected
