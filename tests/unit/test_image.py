"""Images without a runtime: what is built of what, with which arguments, and what an image's file says."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import gpt2hpc
from gpt2hpc import __version__, image
from gpt2hpc.checks import image as checks
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import image_build, image_file
from gpt2hpc.cluster.image_build import Build, Source
from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.errors import ConfigError, Gpt2hpcError, MissingError, UsageError

ROOT = Path(__file__).parents[2]
DEFINITION = """Bootstrap: {{ BOOTSTRAP }}
From: {{ BASE_IMAGE }}

# Another: From: {{ OTHER }}
%arguments
    BOOTSTRAP=docker
    BASE_IMAGE=python:3.12
    TORCH_SPEC=torch==2.13.0
    TORCH_INDEX_URL=
    VERSION=0
    PIP_OPTIONS=--no-cache-dir --quiet

%post
    NO_ARGUMENT=1
"""


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a site's profile nor a place to unpack, but what the test gives."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    for name in ("GPT2HPC_SITE", "APPTAINER_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory at hand."""
    folder = tmp_path / "checkout"
    (folder / "gpt2hpc").mkdir(parents=True)
    (folder / "gpt2hpc" / "__init__.py").write_text(f'"""Ours."""\n\n__version__ = "{__version__}"\n')
    (folder / "apptainer.def").write_text(DEFINITION)
    monkeypatch.chdir(folder)
    return folder


def docker_archive(path: Path, labels: Mapping[str, str], *, architecture: str = "amd64", images: int = 1) -> Path:
    """As `docker save` writes it, with a layer that holds nothing."""
    config = json.dumps({"architecture": architecture, "os": "linux", "config": {"Labels": dict(labels)}}).encode()
    manifest = json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": []}] * images).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in (("c.json", config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def planned(*arguments: str) -> list[str]:
    """The words of the command that a dry run prints."""
    build = image._planned(image.new_parser().parse_args(["build", "--dry-run", *arguments]))
    return build.command(build.out)


def test_arguments_of_a_definition_file() -> None:
    assert image_build.arguments_in(DEFINITION) == {
        "BOOTSTRAP": "docker",
        "BASE_IMAGE": "python:3.12",
        "TORCH_SPEC": "torch==2.13.0",
        "TORCH_INDEX_URL": "",
        "VERSION": "0",
        "PIP_OPTIONS": "--no-cache-dir --quiet",
    }
    assert image_build.arguments_in("Bootstrap: docker\nFrom: x\n%post\n A=1\n") == {}


def test_the_projects_own_definition_file_is_understood() -> None:
    source = image_build.read_definition(ROOT / "apptainer.def")
    assert source.base[0] in source.defaults
    assert source.base[1] in source.defaults
    assert image_build.version_beside(ROOT / "apptainer.def") == __version__


def test_what_is_run(checkout: Path) -> None:
    words = planned(
        "--torch", "torch==2.9", "--torch-index-url", "https://i/cpu", "--base", "ubuntu:24.04", "--", "--bind", "/a:/b"
    )
    given = [word for before, word in itertools.pairwise(words) if before == "--build-arg"]
    assert given == [
        f"VERSION={__version__}",
        "TORCH_SPEC=torch==2.9",
        "TORCH_INDEX_URL=https://i/cpu",
        "BASE_IMAGE=ubuntu:24.04",
        "BOOTSTRAP=docker",
    ]
    assert words[:2] == ["apptainer", "build"]
    assert words[-4:] == ["--bind", "/a:/b", str(checkout / "gpt2hpc.sif"), "apptainer.def"]


def test_a_base_that_is_a_directory(checkout: Path) -> None:
    (checkout / "rootfs").mkdir()
    assert {f"BASE_IMAGE={checkout}/rootfs", "BOOTSTRAP=localimage"} <= set(planned("--base", "localimage:rootfs"))
    assert {"BASE_IMAGE=nvcr.io/nvidia/pytorch:26.01-py3", "BOOTSTRAP=docker"} <= set(
        planned("--base", "docker://nvcr.io/nvidia/pytorch:26.01-py3")
    )


def test_an_archive(checkout: Path) -> None:
    file = docker_archive(checkout / "image.tar", {})
    words = planned("--from", "docker-archive:image.tar", "--out", "made.sif")
    assert words == ["apptainer", "build", str(checkout / "made.sif"), f"docker-archive:{file}"]


def test_the_commit_is_a_label(tmp_path: Path) -> None:
    """Of the checkout that the definition file is in, whatever directory is at hand."""
    source = Source(ROOT / "apptainer.def", defaults={"VCS_REF": ""})
    given = image_build.settled_arguments(source, torch=None, index_url=None, base=None, pairs=(), here=tmp_path)
    assert set(given) <= {"VCS_REF"}
    if (ROOT / ".git").exists():
        assert len(given["VCS_REF"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ("--build-arg FOO=1", UsageError, "takes no argument FOO; it has BOOTSTRAP, BASE_IMAGE, TORCH_SPEC"),
        ("--build-arg FOO", UsageError, "--build-arg=FOO must be NAME=VALUE"),
        ('--torch "a\'b"', UsageError, "has a quote or a line break"),
        ("--torch-index-url https://me:pw@i/simple", UsageError, "TORCH_INDEX_URL has credentials in an address"),
        ("--build-arg PIP_OPTIONS=--index-url=https://token@i/x", UsageError, "PIP_OPTIONS has credentials"),
        ("-- --build-arg 'PIP_OPTIONS=-i https://me:pw@i/x'", UsageError, "mount a pip.conf"),
        ("-- --some-option https://me:pw@i/x", UsageError, "an option has credentials"),
        ("--from other.def", ConfigError, "other.def is not a file"),
        ("--from gpt2hpc/__init__.py", ConfigError, "has no line `Bootstrap:`"),
        ("--from archive.tar", ConfigError, "is it an archive? --from docker-archive:"),
        ("--from docker-archive:apptainer.def", ConfigError, "no docker archive of one image"),
        ("--from docker-archive:two.tar", ConfigError, "no docker archive of one image"),
        ("--from docker-archive:archive.tar --torch x", UsageError, "an archive is taken as it is; drop it"),
        ("--base localimage:nowhere", ConfigError, "nowhere does not exist"),
        ("--out nowhere/x.sif", UsageError, "must be a file in a directory that is there"),
        ("--out gpt2hpc", UsageError, "must be a file in a directory that is there"),
        ("--tmp-dir nowhere", ConfigError, "choose another with --tmp-dir"),
        ("--site nowhere", ConfigError, "--site=nowhere is not a file"),
    ],
)
def test_what_is_refused_before_anything_is_built(
    words: str, kind: type[Gpt2hpcError], said: str, checkout: Path
) -> None:
    docker_archive(checkout / "archive.tar", {})
    docker_archive(checkout / "two.tar", {}, images=2)
    with pytest.raises(kind) as refused:
        image.main(["build", "--dry-run", *shlex.split(words)])
    assert said in refused.value.line
    assert "pw@" not in refused.value.line


def test_a_checkout_of_another_version_is_refused(checkout: Path) -> None:
    (checkout / "gpt2hpc" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    with pytest.raises(ConfigError, match=r"is of gpt2hpc 0\.0\.1, and here it is"):
        planned()


def test_an_installed_package_without_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="a checkout of gpt2hpc has it, what pip installs does not"):
        image_build.find_source(None, here=tmp_path, package=tmp_path / "lib" / "gpt2hpc")
    assert (
        image_build.find_source(None, here=tmp_path, package=Path(gpt2hpc.__file__).parent).path.name == "apptainer.def"
    )


def test_an_image_that_is_there_is_kept(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "gpt2hpc.sif").write_text("old")
    with pytest.raises(UsageError, match=r"is there already; .* --force"):
        image.main(["build", "--dry-run"])
    assert image.main(["build", "--dry-run", "--force"]) == 0
    assert (checkout / "gpt2hpc.sif").read_text() == "old"
    assert capsys.readouterr().out.startswith("apptainer build ")


def test_without_a_runtime_nothing_is_built(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    with pytest.raises(MissingError, match="apptainer and singularity not on PATH: load the module"):
        image.main(["build"])
    assert not (checkout / "gpt2hpc.sif").exists()


@pytest.mark.parametrize(
    ("profile", "option", "runtime"),
    [
        ("", [], "singularity"),
        ("runtime: none", [], "singularity"),
        ("runtime: apptainer", [], "apptainer"),
        ("runtime: pyxis", [], "pyxis"),
        ("runtime: pyxis", ["--runtime", "apptainer"], "apptainer"),
    ],
)
def test_an_image_is_checked_by_what_builds_it_here(
    profile: str, option: list[str], runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a login node that has Singularity alone."""
    monkeypatch.setattr(image.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "singularity" else None)
    (tmp_path / "site.yaml").write_text(f"{profile}\npartition: gpu\n")
    words = ["check", "--site", str(tmp_path / "site.yaml"), *option, "gpt2hpc.sif"]
    _, scene = image._asked(tmp_path / "gpt2hpc.sif", image.new_parser().parse_args(words))
    assert scene.site.runtime == runtime


def test_where_it_is_unpacked(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    env = {"APPTAINER_TMPDIR": str(first), "TMPDIR": str(second)}
    assert image_build.scratch_dir(None, "apptainer", env) == first
    assert image_build.scratch_dir(None, "singularity", env) == second
    assert image_build.scratch_dir(str(second), "apptainer", env) == second


def test_room_that_a_build_takes(tmp_path: Path) -> None:
    def needed(**arguments: str) -> float | None:
        source = Source(tmp_path, defaults={"TORCH_SPEC": "torch"})
        return image_build.needed_bytes(Build("apptainer", source, tmp_path, tmp_path, arguments))

    assert needed() == needed(TORCH_INDEX_URL="https://i/cu126") == image_build.CUDA_BYTES
    assert (
        needed(TORCH_SPEC="torch==2.13.0+cpu") == needed(TORCH_INDEX_URL="https://i/whl/cpu") == image_build.CPU_BYTES
    )
    archive = docker_archive(tmp_path / "image.tar", {})
    of_archive = Build("apptainer", Source(archive, is_archive=True), tmp_path, tmp_path, {})
    assert image_build.needed_bytes(of_archive) == 3 * archive.stat().st_size
    assert image_build.needed_bytes(Build("apptainer", Source(tmp_path), tmp_path, tmp_path, {})) is None


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs is known here")
def test_places_that_are_bad_for_a_build(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_build, "CUDA_BYTES", 1e15)
    build = image._planned(image.new_parser().parse_args(["build", "--dry-run", "--tmp-dir", "/dev/shm"]))
    warned = image_build.warnings(build)
    assert any("/dev/shm has " in line and "takes about 1,000,000 GB" in line for line in warned)
    assert any("is memory (tmpfs)" in line for line in warned)


# What an image's file says --------------------------------------------------------------------------------------


def test_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "image.sif").write_bytes(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + bytes(100))
    (tmp_path / "image.sqsh").write_bytes(b"hsqs" + bytes(100))
    (tmp_path / "text").write_text("x")
    (tmp_path / "root" / "bin").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    docker_archive(tmp_path / "image.tar", {})
    names = ("image.sif", "image.sqsh", "text", "root", "empty", "image.tar")
    kinds = [image_file.kind_of(tmp_path / name) for name in names]
    assert kinds == ["SIF", "squashfs", None, "directory", None, None]
    assert image_file.archive(tmp_path / "image.tar") is not None
    assert image_file.archive(tmp_path / "text") is None


def test_an_archive_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be compressed, and have gigabytes."""
    opened: list[object] = []
    real = tarfile.open
    file = docker_archive(tmp_path / "image.tar", {})
    monkeypatch.setattr(tarfile, "open", lambda path: opened.append(path) or real(path))
    assert image.main(["check", str(file)]) == 0
    assert opened == [file]


def looked(path: Path, **site: object) -> dict[str, tuple[str, str]]:
    scene = Scene({}, site=Site(**site), image=str(path))  # type: ignore[arg-type]
    return {each.name: (each.state, each.text) for each in checks.look(scene)}


def test_a_docker_archive_is_checked_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label, ours = "org.opencontainers.image.version", {"org.opencontainers.image.title": "gpt2hpc"}
    here = checks.ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    good = docker_archive(tmp_path / "good.tar", {**ours, label: __version__}, architecture=here)
    assert {state for state, _ in looked(good).values()} == {"OK"}
    assert image.main(["check", str(good)]) == 0
    assert f"image build --from docker-archive:{good}" in capsys.readouterr().out
    old = docker_archive(tmp_path / "old.tar", {**ours, label: "0.0.1"}, architecture="s390x")
    found = looked(old)
    assert found["version"][0] == "MISSING"
    assert "0.0.1" in found["version"][1]
    assert found["architecture"][0] == "WARN"
    of_base = docker_archive(tmp_path / "of-base.tar", {label: "24.04"}, architecture=here)
    assert looked(of_base)["version"][0] == "WARN", "a version of the base's is none of gpt2hpc's"
    assert image.main(["check", "--json", str(old)]) == 8
    assert {each["name"] for each in json.loads(capsys.readouterr().out)} == {
        "file",
        "label",
        "architecture",
        "version",
        "runtime",
    }


@pytest.mark.parametrize(
    ("version", "gpus", "state", "said"),
    [
        ("2.13.0+cpu", None, "OK", "a CPU build"),
        ("2.13.0+cpu", 4, "WARN", "and the site has GPUs"),
        ("2.13.0+cu128", 4, "OK", "CUDA 12.8, which needs drivers from 525 on"),
        ("2.13.0+cu130", 4, "OK", "drivers from 580 on"),
    ],
)
def test_the_torch_that_the_labels_name(version: str, gpus: int | None, state: str, said: str) -> None:
    [found] = checks._torch(version, Scene({}, site=Site(gpus_per_node=gpus)))
    assert (found.state, said in found.text) == (state, True)


def test_what_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("x")
    for name, said in (("text", "is no SIF, squashfs, docker archive"), ("absent", "is not there")):
        assert image.main(["check", str(tmp_path / name)]) == 8
        assert said in capsys.readouterr().out


def test_a_squashfs_file_without_what_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "image.sqsh").write_bytes(b"hsqs" + bytes(100))
    (tmp_path / "site.yaml").write_text(f"runtime: pyxis\nbinds: [{tmp_path}/gone]\n")
    assert image.main(["check", "--site", str(tmp_path / "site.yaml"), str(tmp_path / "image.sqsh")]) == 8
    said = capsys.readouterr().out
    assert "WARN    labels: not known: enroot's images have none" in said
    assert "MISSING pyxis: there is no srun here" in said
    assert f"MISSING binds: {tmp_path}/gone not here" in said
