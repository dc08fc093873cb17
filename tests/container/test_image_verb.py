"""`gpt2hpc image` as on a login node: a real Apptainer, an unprivileged user, a Python without torch.

What is built here is as small as an image can be: a shell and its libraries. The whole image is built elsewhere, and checked here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2hpc import __version__
from gpt2hpc.cluster import image_version
from gpt2hpc.errors import ConfigError
from tests.container import apptainer, machine
from tests.container.image import Image

pytestmark = pytest.mark.timeout(1200)  # the first test builds the image
ROOT = Path(__file__).parents[2]
FROM = ("--from", "checkout/apptainer.def")
TINY = """Bootstrap: {{ BOOTSTRAP }}
From: {{ FROM }}

%arguments
    BOOTSTRAP=docker
    FROM=debian
    VERSION=0
    GREETING=none
    PAUSE_S=0
    CODE=0

%post
    echo "{{ GREETING }}" > /greeting
    echo in post
    sleep {{ PAUSE_S }}
    exit {{ CODE }}

%labels
    org.opencontainers.image.title gpt2hpc
    org.opencontainers.image.version {{ VERSION }}
"""


@pytest.fixture(scope="module")
def login(image: Image) -> str:
    return str(apptainer.login_python())


@pytest.fixture(scope="module")
def rootfs(image: Image) -> Path:
    """A shell, a program and what they load, as an image's files."""
    root = image.home / "rootfs"
    for each in ("bin", "etc", "dev", "proc", "sys", "tmp", "usr", "var"):
        (root / each).mkdir(parents=True)
    programs = ("/bin/sh", "/bin/sleep")
    libraries = re.findall(r"(/\S+) \(0x", machine.run(["ldd", *programs]))
    for path in {*programs, *libraries}:
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path[1:])
    return root


@pytest.fixture
def workshop(image: Image, rootfs: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The user's directory, with a checkout: a definition file and a package of this version beside it."""
    folder = image.home / request.node.name
    package = folder / "checkout" / "gpt2hpc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'__version__ = "{__version__}"\n')
    (folder / "checkout" / "apptainer.def").write_text(TINY)
    machine.run(["chown", "-R", machine.USER, folder, rootfs])
    yield folder
    machine.run(["rm", "-rf", folder])


def start(image: Image, login: str, folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    user = machine.user_environment()
    env = {**user, "PATH": f"{image.apptainer.parent}:{user['PATH']}", "TMPDIR": str(folder)}
    return subprocess.Popen(
        [*image.prefix, *machine.as_user(login, "-m", "gpt2hpc", "image", *arguments)],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(image: Image, login: str, folder: Path, *arguments: str | Path) -> tuple[int, str]:
    process = start(image, login, folder, *arguments)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def build(image: Image, login: str, folder: Path, rootfs: Path, *arguments: str | Path) -> tuple[int, str]:
    return run(image, login, folder, "build", *FROM, "--base", f"localimage:{rootfs}", *arguments)


def labels(image: Image, file: Path) -> dict[str, str]:
    said = machine.run(machine.as_user(image.apptainer, "inspect", "--json", "--labels", file), cwd="/")
    return image_version.labels_in(said) or {}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_definition_file_becomes_an_image(image: Image, login: str, workshop: Path, rootfs: Path) -> None:
    code, said = build(image, login, workshop, rootfs, "--build-arg", "GREETING=good day", "--out", "made.sif")
    assert left_in(workshop) == {"checkout", "made.sif"}, said
    assert labels(image, workshop / "made.sif")[image_version.VERSION_LABEL] == __version__
    assert "OK      file: SIF, " in said
    assert f"OK      image: {workshop}/made.sif, 0.00 GB, gpt2hpc {__version__} as here" in said
    assert code == 8, "the check afterwards counts: this image has no Python"
    assert "MISSING python of ranks" in said
    shown = machine.run(
        machine.as_user(image.apptainer, "exec", workshop / "made.sif", "/bin/sh", "-c", "read a < /greeting; echo $a"),
        cwd="/",
    )
    assert shown == "good day\n"


def test_a_build_that_fails_leaves_what_was_there(image: Image, login: str, workshop: Path, rootfs: Path) -> None:
    failing = ("--build-arg", "CODE=3")
    code, said = build(image, login, workshop, rootfs, *failing)
    assert code == 8
    assert "apptainer build ended with exit code " in said
    assert left_in(workshop) == {"checkout"}
    (workshop / "gpt2hpc.sif").write_text("old")
    assert build(image, login, workshop, rootfs, *failing)[0] == 2, "not without --force"
    assert build(image, login, workshop, rootfs, *failing, "--force")[0] == 8
    assert (workshop / "gpt2hpc.sif").read_text() == "old"
    assert left_in(workshop) == {"checkout", "gpt2hpc.sif"}


def test_an_image_is_replaced_by_force(image: Image, login: str, workshop: Path, rootfs: Path) -> None:
    (workshop / "gpt2hpc.sif").write_text("old")
    build(image, login, workshop, rootfs, "--force")
    assert labels(image, workshop / "gpt2hpc.sif")[image_version.VERSION_LABEL] == __version__
    assert left_in(workshop) == {"checkout", "gpt2hpc.sif"}


def test_a_disk_that_fills_leaves_what_was_there(image: Image, login: str, workshop: Path, rootfs: Path) -> None:
    """There is room for half of the image."""
    small = workshop / "small"
    small.mkdir()
    machine.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=1777", "none", small])
    try:
        (small / "gpt2hpc.sif").write_text("old")
        code, said = build(image, login, workshop, rootfs, "--out", "small/gpt2hpc.sif", "--force")
        assert code == 8, said
        assert "No space left" in said or "no space left" in said
        assert (small / "gpt2hpc.sif").read_text() == "old"
        assert left_in(small) == {"gpt2hpc.sif"}
    finally:
        machine.run(["umount", small])


def test_an_interrupted_build_leaves_nothing(image: Image, login: str, workshop: Path, rootfs: Path) -> None:
    """As by Ctrl-C, which reaches the runtime too."""
    process = start(
        image, login, workshop, "build", *FROM, "--base", f"localimage:{rootfs}", "--build-arg", "PAUSE_S=600"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "in post":
            break
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 6, said
    assert "gpt2hpc: interrupted" in said
    assert left_in(workshop) == {"checkout"}, "neither a part of an image nor what was unpacked"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_told_to_end_leaves_nothing(
    number: signal.Signals, image: Image, login: str, workshop: Path, rootfs: Path
) -> None:
    """As `kill` tells it, and not the runtime."""
    base = ("--base", f"localimage:{rootfs}")
    process = start(image, login, workshop, "build", *FROM, *base, "--build-arg", "PAUSE_S=600")
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "in post":
            break
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 6, said
    assert left_in(workshop) == {"checkout"}, "neither a part of an image nor what was unpacked"


def test_a_docker_archive_becomes_an_image(image: Image, login: str, workshop: Path, rootfs: Path) -> None:
    archive = docker_archive(workshop / "image.tar", rootfs)
    code, said = run(image, login, workshop, "check", archive.name)
    assert code == 0, said
    assert f"OK      version: gpt2hpc {__version__} as here" in said
    code, said = run(
        image, login, workshop, "build", "--from", f"docker-archive:{archive.name}", "--out", "of-docker.sif"
    )
    assert labels(image, workshop / "of-docker.sif")[image_version.VERSION_LABEL] == __version__
    assert "gpt2hpc 0" in said
    assert code == 8, "the check afterwards counts: this image has no Python"


def docker_archive(path: Path, rootfs: Path) -> Path:
    """What `docker save` would write of an image with those files."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in ("bin", "lib", "lib64", "usr"):
            if (rootfs / name).exists():
                tar.add(rootfs / name, arcname=name)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {"Labels": {image_version.TITLE_LABEL: "gpt2hpc", image_version.VERSION_LABEL: __version__}},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": ["gpt2hpc:tiny"], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for member, content in (
            (name, config),
            ("layer.tar", layer.getvalue()),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(member)
            entry.size, entry.mtime = len(content), int(time.time())
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_labels_of_the_base_yield_to_ours(image: Image, login: str, workshop: Path, rootfs: Path) -> None:
    """As Ubuntu's and NVIDIA's bases have them. The definition file labels as the project's own does."""
    (workshop / "base.def").write_text(
        TINY.replace("image.title gpt2hpc", "image.title ubuntu").replace("{{ VERSION }}", "24.04")
    )
    _, said = run(
        *(image, login, workshop, "build", "--from", "base.def", "--base", f"localimage:{rootfs}", "--out", "base.sif")
    )
    assert labels(image, workshop / "base.sif")[image_version.VERSION_LABEL] == "24.04", said
    assert "is of gpt2hpc" not in said, "the version of something else is no version of gpt2hpc's"
    assert version_label(image, login, workshop, "") == "24.04"
    assert version_label(image, login, workshop, own_labels()) == __version__


def version_label(image: Image, login: str, workshop: Path, post: str) -> str:
    """Of an image on that base."""
    of_base = TINY.replace("    exit {{ CODE }}\n", post)
    (workshop / "own.def").write_text(of_base.replace("    VERSION=0\n", f"    VERSION={__version__}\n    VCS_REF=\n"))
    base = ("--base", "localimage:base.sif")
    _, said = run(image, login, workshop, "build", "--from", "own.def", *base, "--out", "own.sif", "--force")
    assert (workshop / "own.sif").exists(), said
    return labels(image, workshop / "own.sif")[image_version.VERSION_LABEL]


def own_labels() -> str:
    """The lines of the definition file that label."""
    found = re.search(
        r'(?ms)^    \{\n(?: +echo "[^\n]*"\n)+ +\} >> "\$APPTAINER_LABELS"\n', (ROOT / "apptainer.def").read_text()
    )
    assert found
    return found[0].replace("$torch", "2")


def test_the_whole_image_is_well(image: Image, login: str, workshop: Path) -> None:
    code, said = run(image, login, workshop, "check", "--json", image.file)
    found = {each["name"]: each for each in json.loads(said)}
    assert {name: found[name]["state"] for name in ("file", "image", "apptainer", "python of ranks", "torch")} == {
        "file": "OK",
        "image": "OK",
        "apptainer": "OK",
        "python of ranks": "OK",
        "torch": "OK",
    }, said
    assert f"gpt2hpc {__version__} as here" in found["image"]["text"]
    assert "gpt2hpc.torch=2." in said
    assert code == 0, said


def test_a_bind_that_is_missing_and_a_runtime_that_is(image: Image, login: str, workshop: Path) -> None:
    (workshop / "site.yaml").write_text(f"runtime: singularity\nbinds: [{workshop}/gone]\n")
    code, said = run(image, login, workshop, "check", "--site", "site.yaml", image.file)
    assert code == 8
    assert "singularity: not on PATH" in said
    assert f"binds: {workshop}/gone not here" in said


def test_an_image_of_another_version_is_refused_before_it_is_queued(
    image: Image,
    login: str,
    workshop: Path,
    rootfs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(image, login, workshop, rootfs, "--build-arg", "VERSION=0.0.9", "--out", "old.sif")
    monkeypatch.setenv("PATH", str(image.apptainer.parent), prepend=os.pathsep)
    assert image_version.version_in(str(workshop / "old.sif"), "apptainer") == "0.0.9"
    with pytest.raises(ConfigError, match=r"is of gpt2hpc 0\.0\.9, and here it is"):
        image_version.refuse_other_version(str(workshop / "old.sif"), "apptainer")
    image_version.refuse_other_version(str(image.file), "apptainer")
    assert capsys.readouterr().err == "", "where it is known nothing is said"
    code, said = run(image, login, workshop, "check", "old.sif")
    assert code == 8
    assert "old.sif is of gpt2hpc 0.0.9, and here it is" in said
