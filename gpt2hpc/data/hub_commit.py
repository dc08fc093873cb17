"""One commit to a repository of the Hub, and whether what it holds is what was sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2hpc.data import hub
from gpt2hpc.data.hub import HubFile, Repository
from gpt2hpc.data.patience import asked
from gpt2hpc.data.shards import sha256_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
OURS = "made by gpt2hpc"
"""Stands in every card of ours."""


def create(where: Repository, *, private: bool) -> None:
    """Make the repository unless it is there; one that is there stays as public as it is."""
    asked(where, lambda api: api.create_repo(where.repo, repo_type=where.kind, private=private, exist_ok=True))


def commit(where: Repository, files: Mapping[str, Path | bytes], message: str) -> None:
    """One commit; the client uploads the contents first, and skips those that the Hub has."""
    from huggingface_hub import CommitOperationAdd

    def attempt(api: HfApi) -> None:
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        api.create_commit(where.repo, operations, commit_message=message, repo_type=where.kind)

    with hub.quiet():
        asked(where, attempt)


def is_same(file: HubFile | None, path: Path, *, sha256: str | None = None) -> bool:
    """By the sha256 of large-file storage, or by git's id of what a repository keeps as an ordinary file.

    `sha256` is that of `path`, where it is known.
    """
    if file is None or file.bytes != path.stat().st_size:
        return False
    if file.sha256 is not None:
        return file.sha256 == (sha256 or sha256_of(path))
    contents = path.read_bytes()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


def may_write_card(where: Repository, there: Mapping[str, HubFile]) -> bool:
    """Whether there is no card, or one of ours."""
    if CARD not in there:
        return True
    with hub.fetched(where, CARD) as path:
        return OURS in path.read_text(encoding="utf-8", errors="replace")
