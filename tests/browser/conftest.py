from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.browser import chromium
from tests.tiny import gpt2hpc


@pytest.fixture(scope="session", autouse=True)
def _browser() -> None:
    if reason := chromium.lacking():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no browser here: {reason}")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return tmp_path / "profile"


@pytest.fixture(scope="session")
def killed_run(shared_data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """12 steps of a real training on two ranks, one of which was killed after step 6 was saved."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "killed")
    assert tiny.run_ranks(run, tiny.config(shared_data.where), nproc=2, options=["--kill", "8", "0"]) == 137
    done = gpt2hpc("train", "--nproc", "2", "--run-dir", run.path)
    assert done.returncode == 0, done.stderr
    return run
