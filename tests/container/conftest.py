from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.container import apptainer, buildah, debian, machine, parts
from tests.container.buildah import Engine
from tests.container.image import Image


@pytest.fixture(scope="session")
def able(request: pytest.FixtureRequest) -> pytest.FixtureRequest:
    """A machine that can have no container is an error in CI and skips elsewhere."""
    if reason := apptainer.lacking():
        fail_or_skip = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        fail_or_skip(f"no container tests: {reason}")
    return request


@contextmanager
def aloud(request: pytest.FixtureRequest) -> Iterator[None]:
    """What takes minutes, the first time, says so."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        yield


@pytest.fixture(scope="session")
def offline(able: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    with aloud(able):
        debian.install("iproute2", "util-linux")
    with machine.no_network() as prefix:
        yield prefix


@contextmanager
def home() -> Iterator[Path]:
    """A directory of the unprivileged user's."""
    owner = machine.user()
    folder = Path(tempfile.mkdtemp(dir=owner.pw_dir, prefix="work-"))
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def image(able: pytest.FixtureRequest, offline: tuple[str, ...]) -> Iterator[Image]:
    """The image of apptainer.def, of the project as it is."""
    with aloud(able):
        programs, file = apptainer.install(), apptainer.build()
    with home() as folder:
        yield Image(programs / "apptainer", file, offline, folder)


@pytest.fixture(scope="session")
def data(image: Image) -> Path:
    """Python's own documentation as tokens, made in the image."""
    code, said = image.run("run", "prepare", "--source", "demo", "--out", "data")
    assert code == 0, said
    assert "100%" in said
    return image.home / "data"


@pytest.fixture(scope="session")
def engine(able: pytest.FixtureRequest, offline: tuple[str, ...]) -> Iterator[Engine]:
    """The image of docker/Dockerfile, of the project as it is, and a folder that anybody may write to."""
    with aloud(able):
        store, name = buildah.build()
    with home() as folder, store.container(name) as container:
        folder.chmod(0o777)
        yield Engine(store, name, container, offline, folder)


@pytest.fixture(scope="session")
def engine_sif(engine: Engine, able: pytest.FixtureRequest, offline: tuple[str, ...]) -> Iterator[Image]:
    """The same image, by way of an archive, as a file of Apptainer's."""
    file = parts.WHERE / f"docker-{parts.fingerprint(*buildah.INPUTS)}.sif"
    with aloud(able):
        programs = apptainer.install()
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=parts.WHERE, prefix="archive-") as folder:
                Path(folder).chmod(0o755)
                apptainer.from_archive(buildah.archive(engine.store, engine.image, Path(folder)), file)
            parts.discard_old(parts.WHERE, "docker-*.sif")
    with home() as folder:
        yield Image(programs / "apptainer", file, offline, folder)


@pytest.fixture(scope="session")
def bare(engine: Engine) -> Iterator[str]:
    """A container of the base system alone."""
    with engine.store.container(buildah.base(engine.store)) as container:
        yield container
