"""One commit to a repository of the Hub, and whether what it holds is what was sent."""

from __future__ import annotations

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
    return file is not None and file.is_same_as(hub.file_here(path, sha256))


def may_write_card(where: Repository, there: Mapping[str, HubFile], *, written: str | None = None) -> bool:
    """Whether there is no card, or one of ours: whose sha256 is that of the one `written` before, where that is known."""
    if CARD not in there:
        return True
    with hub.fetched(where, CARD) as path:
        if written is not None:
            return sha256_of(path) == written
        return OURS in path.read_text(encoding="utf-8", errors="replace")
