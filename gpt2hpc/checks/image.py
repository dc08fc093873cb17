"""The image itself: what its file and its labels say, against this package, this machine and the site."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from gpt2hpc import __version__
from gpt2hpc.checks import gpu
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import image_file, image_version
from gpt2hpc.cluster.image_file import Archive
from gpt2hpc.finding import Finding, missing, ok, warn

SHOWN = ("org.opencontainers.image.", "gpt2hpc.")
"""Beginnings of the labels that say something; a runtime adds others of its own."""
TORCH_LABEL, ARCHITECTURE_LABEL = "gpt2hpc.torch", "org.label-schema.build-arch"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""As uname names them, and as images do."""


def look(scene: Scene) -> list[Finding]:
    """Of an image that is a file or a directory; that it is there was found out before."""
    path = Path(str(scene.image))
    kind = image_file.kind_of(path)
    if kind is None:
        archive = image_file.archive(path)
        text = f"{path} is no SIF, squashfs, docker archive or unpacked image; gpt2hpc image build makes a SIF"
        return [missing("file", text)] if archive is None else _archive(path, archive, scene)
    found = [ok("file", kind if kind == "directory" else _of_file(kind, path))]
    labels = image_version.labels_of(str(path), scene.site.runtime)
    if labels is None:
        why = "enroot's images have none" if kind == "squashfs" else f"{scene.site.runtime} does not tell them here"
        return [*found, warn("labels", f"not known: {why}; version and torch are what the image's own gpt2hpc says")]
    return [*found, *of_labels(labels, labels.get(ARCHITECTURE_LABEL, ""), scene)]


def _of_file(kind: str, path: Path) -> str:
    return f"{kind}, {path.stat().st_size:,} bytes"


def _archive(path: Path, facts: Archive, scene: Scene) -> list[Finding]:
    """What can be told of one before it is converted."""
    mend = f"gpt2hpc image build --from docker-archive:{path}"
    text = f"no cluster runs an archive as it is: `{mend}` makes a SIF, to be checked against the site; `docker load` takes it"
    told = [*of_labels(facts.labels, facts.architecture, scene), _version(facts.labels, str(path)), ok("runtime", text)]
    return [ok("file", _of_file("docker archive", path)), *told]


def _version(labels: Mapping[str, str], image: str) -> Finding:
    there = image_version.version_among(labels)
    if there is None:
        return warn("version", f"it has no label {image_version.VERSION_LABEL} of gpt2hpc's: is gpt2hpc in it?")
    if there != __version__:
        return missing("version", image_version.mismatch(image, there))
    return ok("version", f"gpt2hpc {there} as here")


def of_labels(labels: Mapping[str, str], architecture: str, scene: Scene) -> list[Finding]:
    shown = [ok("label", f"{name}={value}") for name, value in sorted(labels.items()) if name.startswith(SHOWN)]
    found = shown or [warn("labels", "none of gpt2hpc's: was it built from another definition file?")]
    here = ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    if architecture and architecture != here:
        found.append(
            warn(
                "architecture",
                f"the image is for {architecture}, and this machine is {here}: build it on nodes of its kind",
            )
        )
    return [*found, *_torch(labels.get(TORCH_LABEL), scene)]


def _torch(version: str | None, scene: Scene) -> list[Finding]:
    """What its build of torch wants of a driver, as far as its version tells; what is not told its Python is asked for."""
    if version is None:
        return []
    if version.endswith("+cpu"):
        text = f"{version}, a CPU build"
        mend = "build it with another --torch or --torch-index-url"
        return [
            warn("torch", f"{text}, and the site has GPUs: {mend}") if scene.site.gpus_per_node else ok("torch", text)
        ]
    if match := re.search(r"\+cu(\d+)(\d)$", version):
        cuda = f"{match[1]}.{match[2]}"
        least = gpu.least_driver(cuda)
        return [ok("torch", f"{version}: CUDA {cuda}" + (f", which needs drivers from {least} on" if least else ""))]
    return []
