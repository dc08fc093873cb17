"""The version in an image's labels, as far as it can be told without a runtime; tests/container asks a real one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gpt2hpc.cluster import image_version


def inspected(**labels: str) -> str:
    """As Apptainer 1.4.5 prints them."""
    return json.dumps({"data": {"attributes": {"labels": labels}}, "type": "container"}, indent="\t")


def test_labels_in_what_inspect_prints() -> None:
    said = inspected(**{image_version.VERSION_LABEL: "0.1.0", "gpt2hpc.torch": "2.13.0"})
    assert image_version.labels_in(said) == {"org.opencontainers.image.version": "0.1.0", "gpt2hpc.torch": "2.13.0"}
    assert image_version.labels_in(inspected()) == {}


def test_labels_in_what_docker_prints() -> None:
    said = json.dumps([{"Id": "sha256:1", "Config": {"Labels": {image_version.VERSION_LABEL: "0.1.0"}}}])
    assert image_version.labels_in(said) == {image_version.VERSION_LABEL: "0.1.0"}
    assert image_version.labels_in(json.dumps([{"Config": {"Labels": None}}])) is None


@pytest.mark.parametrize("said", ["", "FATAL: no", "[]", "{}", '{"data": {"attributes": {"labels": null}}}'])
def test_what_is_no_such_thing_has_no_labels(said: str) -> None:
    assert image_version.labels_in(said) is None


@pytest.mark.parametrize("runtime", ["apptainer", "singularity", "pyxis", "docker"])
def test_what_cannot_be_told_is_said_and_no_error(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A login node without a runtime: it must be possible to submit from there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert image_version.version_in("/some/image.sif", runtime) is None
    image_version.refuse_other_version("/some/image.sif", runtime)
    out, said = capsys.readouterr()
    assert out == ""
    assert said.count("\n") == 1
    assert f"/some/image.sif is not known here ({runtime} " in said


def test_the_version_is_believed_where_the_title_is_ours() -> None:
    """An image keeps the labels of its base, and a base of Ubuntu's names a version too."""
    ours = {image_version.TITLE_LABEL: "gpt2hpc", image_version.VERSION_LABEL: "0.0.9"}
    assert image_version.version_among(ours) == "0.0.9"
    assert image_version.version_among({**ours, image_version.TITLE_LABEL: "ubuntu"}) is None
    assert image_version.version_among({image_version.VERSION_LABEL: "24.04"}) is None


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo FATAL: no such image >&2; exit 255", "(apptainer inspect failed: FATAL: no such image)"),
        ("exit 3", "(apptainer inspect failed: exit code 3)"),
        ("exec sleep 60", "(apptainer does not answer in 0.5 s)"),
        ("echo '{}'", "(apptainer tells none)"),
    ],
)
def test_why_it_is_not_known(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "apptainer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(image_version, "PATIENCE_S", 0.5 if "sleep" in script else 60.0)
    image_version.refuse_other_version("/i.sif", "apptainer")
    assert why in capsys.readouterr().err


def test_the_refusal_names_both_versions_and_the_mend() -> None:
    said = image_version.mismatch("/i.sif", "0.0.9")
    assert "/i.sif is of gpt2hpc 0.0.9" in said
    assert "gpt2hpc image build" in said
