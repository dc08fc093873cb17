# ruff: noqa: E402

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Or a failed assert of a module that tests share would not say with what values.
pytest.register_assert_rewrite("tests.tiny", "tests.peaks", "tests.hub_server", "tests.cluster", "tests.container")

from gpt2hpc import garbage
from gpt2hpc.data.manifest import Manifest
from tests import first_calls, tiny
from tests.cluster import slurm
from tests.cluster.kit import PAIRS, Kit, new_kit
from tests.cluster.slurm import Cluster


def pytest_collection_finish() -> None:
    """What all tests import stays."""
    garbage.leave()


@pytest.fixture(scope="session", autouse=True)
def _settled() -> None:
    """Other libraries, which ours is compared with, call these with all threads at once."""
    first_calls.settle()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared directory of tiny data."""
    tiny.make_data(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Tiny data that tests only read."""
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm, one for the whole session, where other users can reach it too."""
    if reason := slurm.lacking():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no Slurm here: {reason}")
    with tempfile.TemporaryDirectory(prefix="gpt2hpc-slurm-") as folder:
        Path(folder).chmod(0o755)
        with slurm.running(Path(folder) / "slurm", nodes=2 * PAIRS) as running:
            yield running


@pytest.fixture(scope="session")
def kit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return new_kit(cluster, tmp_path_factory.mktemp("kit"))
