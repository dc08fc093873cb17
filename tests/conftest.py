from __future__ import annotations

from pathlib import Path

import pytest

from gpt2hpc.data.manifest import Manifest
from tests import tiny


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared directory of tiny data."""
    tiny.make_data(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Tiny data that tests only read."""
    return tiny.make_data(tmp_path_factory.mktemp("data"))
