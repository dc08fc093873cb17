"""Datasets on the Hugging Face Hub: pinned to a commit, listed with sizes and hashes, fetched whole and verified.

The client library is imported only when the Hub is needed. It compares sizes; that the bytes are right is checked here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from gpt2hpc import durable
from gpt2hpc.data.patience import STAGE, WrongBytesError, asked
from gpt2hpc.data.shards import sha256_of
from gpt2hpc.errors import DataError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://datasets/"
DEFAULT_CONFIGS = {"HuggingFaceFW/fineweb-edu": "sample-10BT"}
"""Where a dataset's own default is terabytes."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
T = TypeVar("T")
_NAME = re.compile(r"(?!.*--|.*\.\.|.*\.git$)\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""As the Hub's client takes them: huggingface_hub, `validate_repo_id`."""


@dataclass(frozen=True)
class Repository:
    """A dataset, or a model, at a revision: a branch, a tag or, once pinned, a commit."""

    repo: str
    revision: str | None = None
    kind: Literal["dataset", "model"] = "dataset"

    def __str__(self) -> str:
        scheme = SCHEME if self.kind == "dataset" else "hf://"
        return f"{scheme}{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `sha256` is known of those in large-file storage, git's own id of all."""

    path: str
    bytes: int
    sha256: str | None = None
    blob_id: str | None = None

    def is_same_as(self, other: HubFile) -> bool:
        """Whether size and contents are equal, by what is known of both."""
        if self.sha256 and other.sha256:
            return (self.bytes, self.sha256) == (other.bytes, other.sha256)
        return self.blob_id is not None and (self.bytes, self.blob_id) == (other.bytes, other.blob_id)


LARGEST_ORDINARY = 10 * 2**20
"""Bytes; what is larger is in large-file storage, with a sha256."""


def file_here(path: Path, sha256: str | None = None) -> HubFile:
    """A file of this disk as the Hub describes it; its `sha256` is taken on trust, if given."""
    size = path.stat().st_size
    return HubFile(path.name, size, sha256 or sha256_of(path), _blob_id(path) if size <= LARGEST_ORDINARY else None)


def _blob_id(path: Path) -> str:
    """Git's id of a file's contents."""
    contents = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


def is_remote(where: str) -> bool:
    return where.startswith(SCHEME)


def is_name(text: str) -> bool:
    """Whether it is `USER/NAME`, and nothing more."""
    return _NAME.fullmatch(text) is not None


def looks_like_dataset(text: str) -> bool:
    return is_remote(text) or is_name(text)


def parse(text: str, revision: str | None = None) -> Repository:
    """`USER/NAME`, or `hf://datasets/USER/NAME[@REVISION]`; DataError for anything else."""
    repo, _, own = text.removeprefix(SCHEME).partition("@")
    if not _NAME.fullmatch(repo):
        raise DataError(f"{text} is no dataset on the Hub; write {SCHEME}USER/NAME or {SCHEME}USER/NAME@REVISION")
    return Repository(repo, own or revision)


def split_path(path: str) -> tuple[Repository, str]:
    """The dataset and the path in it of `hf://datasets/USER/NAME@REVISION/PATH`."""
    user, name, inside = path.removeprefix(SCHEME).split("/", 2)
    return parse(f"{user}/{name}"), inside


def pinned(wanted: Repository) -> Repository:
    """The repository at the commit that its revision means now."""
    if wanted.revision and _COMMIT.fullmatch(wanted.revision):
        return wanted
    info = asked(wanted, lambda api: api.repo_info(wanted.repo, revision=wanted.revision, repo_type=wanted.kind))
    return replace(wanted, revision=info.sha)


def listing(dataset: Repository) -> list[HubFile]:
    """Every file of the repository, by path."""
    tree = asked(
        dataset,
        lambda api: list(
            api.list_repo_tree(dataset.repo, recursive=True, revision=dataset.revision, repo_type=dataset.kind)
        ),
    )
    return sorted((described(each) for each in tree if hasattr(each, "size")), key=lambda file: file.path)


def described(entry: Any) -> HubFile:
    """A file of a listing, as the client gives it."""
    return HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)


def source_files(dataset: Repository, config: str | None, split: str) -> list[HubFile]:
    """The files of one configuration and split, in the dataset's order, every one with its hash."""
    import datasets

    config = config or DEFAULT_CONFIGS.get(dataset.repo)
    datasets.disable_progress_bars()

    def attempt(api: HfApi) -> Any:
        try:
            return datasets.load_dataset_builder(dataset.repo, config, revision=dataset.revision)
        except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            said = " ".join(str(error).split())
            raise DataError(f"{dataset}: {said[:400]}; name its configuration with --config") from None

    builder = asked(dataset, attempt)
    found = builder.config.data_files or {}
    if split not in found:
        raise DataError(f"{dataset} has no split {split!r} but {', '.join(found) or 'none'}; choose one with --split")
    paths = [_inside(dataset, str(each)) for each in found[split]]
    known = {file.path: file for file in listing(dataset)}
    return [_hashed(dataset, known[path]) for path in paths]


def _inside(dataset: Repository, url: str) -> str:
    """The path in the repository of a file as `datasets` names it: `hf://datasets/USER/NAME@COMMIT/PATH`."""
    return url.partition(f"{dataset.repo}@")[2].partition("/")[2]


def _hashed(dataset: Repository, file: HubFile) -> HubFile:
    """With its sha256, for which a small file that is not in large-file storage is fetched."""
    if file.sha256:
        return file
    with fetched(dataset, file.path) as path:
        return HubFile(file.path, file.bytes, sha256_of(path))


# Contents -----------------------------------------------------------------------------------------------------------


def fetch(
    dataset: Repository,
    path: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    blob_id: str | None = None,
    elsewhere: str = STAGE,
) -> None:
    """Download a file to `target`, which is there whole and verified, or not at all.

    No locks (they do nothing on Lustre): each caller downloads beside, and renames; two of them do no harm. A dropped
    connection, a 429, a 5xx and a wrong hash are tried again; then DataError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = f".{target.name}.{socket.gethostname()}.{os.getpid()}."

    def attempt(api: HfApi) -> None:
        with tempfile.TemporaryDirectory(
            prefix=beside, suffix=".tmp", dir=target.parent, ignore_cleanup_errors=True
        ) as there:
            found = Path(
                api.hf_hub_download(
                    dataset.repo, path, repo_type=dataset.kind, revision=dataset.revision, local_dir=there
                )
            )
            if size is not None and found.stat().st_size != size:
                raise WrongBytesError(f"{found.stat().st_size} bytes came instead of {size}")
            if sha256 is not None and (digest := sha256_of(found)) != sha256:
                raise WrongBytesError(f"what came has sha256 {digest[:12]}… instead of {sha256[:12]}…")
            if blob_id is not None and _blob_id(found) != blob_id:
                raise WrongBytesError(f"what came is not what git calls {blob_id[:12]}…")
            with found.open("rb") as file:
                os.fsync(file.fileno())
            found.replace(target)
        durable.fsync_dir(target.parent)

    with quiet():
        asked(dataset, attempt, what=path, elsewhere=elsewhere)


@contextlib.contextmanager
def fetched(dataset: Repository, path: str) -> Iterator[Path]:
    """A small file for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="gpt2hpc-") as folder:
        target = Path(folder) / Path(path).name
        fetch(dataset, path, target)
        yield target


def read_from(path: str, read: Callable[[IO[bytes]], T]) -> T:
    """What `read` makes of `hf://datasets/USER/NAME@COMMIT/PATH`, of which it may read parts; asked again as a whole."""
    from huggingface_hub import HfFileSystem

    def attempt(api: HfApi) -> T:
        with HfFileSystem().open(path, "rb", block_size=1 << 20) as file:
            return read(file)

    return asked(path, attempt)


def read_start(dataset: Repository, path: str, count: int) -> bytes:
    """The first bytes of a file."""
    return read_from(f"{dataset}/{path}", lambda file: file.read(count))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a progress bar for each file: logs would be full of them."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def clear_leftovers(directory: Path) -> None:
    """Remove what this process's downloads left half-done."""
    for path in directory.rglob(f".*.{socket.gethostname()}.{os.getpid()}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def clear_downloads(directory: Path) -> None:
    """Once all is done: what killed downloads left, and folders that are empty."""
    for path in directory.rglob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted((*directory.rglob("*"), directory), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
