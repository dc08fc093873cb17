from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container import apptainer, machine
from tests.container.image import Image


@pytest.fixture(scope="session")
def image(request: pytest.FixtureRequest) -> Iterator[Image]:
    """The image of the project as it is; a machine that cannot have one is an error in CI and skips elsewhere."""
    if reason := apptainer.lacking():
        fail_or_skip = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        fail_or_skip(f"no container tests: {reason}")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # minutes, the first time: say so
        programs, file = apptainer.install(), apptainer.build()
    owner = machine.user()
    home = Path(tempfile.mkdtemp(dir=owner.pw_dir, prefix="work-"))
    os.chown(home, owner.pw_uid, owner.pw_gid)
    with machine.no_network() as prefix:
        yield Image(programs / "apptainer", file, prefix, home)
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def data(image: Image) -> Path:
    """Python's own documentation as tokens, made in the image."""
    code, said = image.run("run", "prepare", "--source", "demo", "--out", "data")
    assert code == 0, said
    assert "100%" in said
    return image.home / "data"
