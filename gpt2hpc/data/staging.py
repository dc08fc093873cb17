"""A staged directory: files of the Hub and their `stage.json`, for compute nodes that have no internet."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.shards import Shard
from gpt2hpc.errors import DataError

FORMAT = 1
NAME = "stage.json"


@dataclass(frozen=True)
class StagedFile:
    """A file by its path below the staged directory, and where it came from."""

    path: str
    bytes: int
    sha256: str
    origin: str


def is_staged(directory: Path) -> bool:
    return (directory / NAME).is_file()


def files_below(folder: Path) -> list[Path]:
    """The files of `folder` that were staged, in order, if it lies in a staged directory; else none."""
    folder = folder.absolute()
    for directory in (folder, *folder.parents):
        if is_staged(directory):
            found = [file.path for file in read(directory) if (directory / file.path).is_relative_to(folder)]
            parts = sorted({"/".join(path.split("/")[:4]) for path in found if path.startswith("datasets/")})
            if len(parts) > 1:
                raise DataError(
                    f"--source={folder} holds several staged datasets; name one, as {directory / parts[-1]}"
                )
            return sorted(directory / path for path in found)
    return []


def add(directory: Path, files: list[StagedFile]) -> None:
    """Note files that are there; those noted before stay."""
    known = {file.path: file for file in (*(read(directory) if is_staged(directory) else ()), *files)}
    listed = [dataclasses.asdict(known[path]) for path in sorted(known)]
    durable.publish_json(directory / NAME, {"format": FORMAT, "files": listed})


def read(directory: Path) -> list[StagedFile]:
    """Raises DataError where stage.json is none of ours."""
    facts: Any = durable.read_json(directory / NAME)
    with contextlib.suppress(KeyError, TypeError):
        if facts["format"] == FORMAT:
            return [StagedFile(**file) for file in facts["files"]]
    raise DataError(f"{directory / NAME} is damaged or of another version; stage into another directory")


def as_manifest(directory: Path) -> Manifest:
    """The staged files as what `verify` compares."""
    shards = (Shard(file.path, "train", 0, None, file.bytes, file.sha256) for file in read(directory))
    return Manifest(str(directory), tuple(shards), vocab_size=0)
