"""What kind of container image a file is, and what a docker archive says of itself: read from the file, without a runtime."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["SIF", "squashfs", "directory"]
SIF_MAGIC, SIF_MAGIC_AT = b"SIF_MAGIC", 32
"""Behind the launch script's line; https://github.com/apptainer/sif, header."""
SQUASHFS_MAGIC = b"hsqs"


@dataclass(frozen=True)
class Archive:
    """An image as `docker save` writes it: its labels, and the architecture as Go names it."""

    labels: Mapping[str, str]
    architecture: str


def kind_of(path: Path) -> Kind | None:
    """Of what a runtime runs as it is, told from its first bytes; None for all else, an `archive` too."""
    if path.is_dir():
        return "directory" if (path / "bin").exists() or (path / ".singularity.d").exists() else None
    with path.open("rb") as file:
        head = file.read(SIF_MAGIC_AT + len(SIF_MAGIC))
    if head[SIF_MAGIC_AT:] == SIF_MAGIC:
        return "SIF"
    if head.startswith(SQUASHFS_MAGIC):
        return "squashfs"
    return None


def archive(path: Path) -> Archive | None:
    """None where it is no docker archive, or holds several images. A compressed one is unpacked for that, which may take minutes."""
    try:
        with tarfile.open(path) as tar:
            images = json.loads(_member(tar, "manifest.json"))
            config: dict[str, Any] = json.loads(_member(tar, images[0]["Config"]))
    except (tarfile.TarError, OSError, EOFError, ValueError, LookupError, TypeError):
        return None
    if len(images) != 1:
        return None
    labels = (config.get("config") or {}).get("Labels") or {}
    return Archive({str(name): str(value) for name, value in labels.items()}, str(config.get("architecture", "")))


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise LookupError(name)
    return file.read()
