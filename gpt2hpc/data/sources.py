"""What is tokenized: the demo text, files here, or a dataset on the Hugging Face Hub; each file pinned by size and hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt2hpc.data import hub, staging
from gpt2hpc.data.demo import DEMO, demo_documents
from gpt2hpc.errors import DataError

Format = Literal["demo", "text", "jsonl", "parquet", "table"]

FORMATS: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".tsv", ".json", ".arrow"), "table"),
}
COMPRESSIONS: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".zst": "zstd"}
PACKED = (*(f"{suffix}.zst" for suffix in (".csv", ".tsv", ".json", ".arrow", ".parquet")), ".arrow.gz", ".parquet.gz")
"""Kinds that are not read as they are."""

_EDGE_BYTES = 8 << 20


@dataclass(frozen=True)
class SourceFile:
    """One input and what pins it.

    Args:
        path: Absolute, or `hf://datasets/USER/NAME@COMMIT/PATH`.
        bytes: Its size.
        hash: `sha256:…` of the whole file; `edges:…` of the first and last 8 MiB of a larger one that lies here, so that
            planning need not read terabytes.
    """

    path: str
    bytes: int
    hash: str

    @property
    def format(self) -> Format:
        return DEMO if self.path == DEMO else format_of(self.path) or "text"

    @property
    def compression(self) -> Literal["gzip", "zstd"] | None:
        return COMPRESSIONS.get(Path(self.path).suffix.lower())

    @property
    def is_remote(self) -> bool:
        return hub.is_remote(self.path)


@dataclass(frozen=True)
class Selection:
    """Which files of a Hub dataset: its configuration, its split and its revision; None for the dataset's own defaults.

    `commits` are those that datasets were pinned to before, and stay at.
    """

    config: str | None = None
    split: str = "train"
    revision: str | None = None
    commits: Mapping[str, str] = field(default_factory=dict)


def find_files(sources: Sequence[str], selection: Selection) -> list[SourceFile]:
    """The files of `demo`, paths and Hub datasets, the same ones whatever the order of a directory's listing.

    Raises DataError for a source that is missing, or that holds nothing to read.
    """
    found = [file for source in sources for file in _files(source, selection)]
    seen: dict[str, str] = {}
    for file in found:
        if file.path.lower().endswith(PACKED):
            raise DataError(f"--source: {file.path} is read unpacked only; unpack it, and name what comes of it")
        real = file.path if file.is_remote else os.path.realpath(file.path)
        if real in seen:
            raise DataError(f"--source names {file.path} twice (as {seen[real]}); name it once")
        seen[real] = file.path
    return found


def _of_demo() -> tuple[int, str]:
    """Size and hash of the demo text, which differ from Python to Python."""
    text = "\0".join(demo_documents()).encode()
    return len(text), f"sha256:{hashlib.sha256(text).hexdigest()}"


def _files(source: str, selection: Selection) -> list[SourceFile]:
    if source == DEMO:
        return [SourceFile(DEMO, *_of_demo())]
    path = Path(source)
    if path.is_dir():
        return [_pinned(each) for each in _inside(path)]
    if path.exists():
        return [_pinned(path)]
    check_name(source)
    try:
        return _on_hub(source, selection)
    except DataError as error:
        if hub.is_remote(source):
            raise
        raise DataError(f"--source={source} is no file or directory here, and {error}") from None


def check_name(source: str) -> None:
    """Raise DataError for one that is nothing here, nor the name of a Hub dataset; the Hub is not asked."""
    may_be_on_hub = hub.is_remote(source) or (
        hub.looks_like_dataset(source) and format_of(source) is None and not Path(source).parent.exists()
    )
    if not (source == DEMO or Path(source).exists() or may_be_on_hub):
        raise DataError(
            f"--source={source} does not exist; give a file, a directory, a Hub dataset as USER/NAME, or `{DEMO}`"
        )


def _on_hub(source: str, selection: Selection) -> list[SourceFile]:
    named = hub.parse(source, selection.revision)
    dataset = hub.pinned(hub.Repository(named.repo, named.revision or selection.commits.get(named.repo)))
    files = hub.source_files(dataset, selection.config, selection.split)
    unknown = [file.path for file in files if format_of(file.path) is None]
    if unknown:
        raise DataError(
            f"--source={source}: {unknown[0]} is none of {', '.join(FORMATS)}; convert the dataset, or choose another --config"
        )
    return [SourceFile(f"{dataset}/{file.path}", file.bytes, f"sha256:{file.sha256}") for file in files]


def format_of(path: str | Path) -> Format | None:
    """By the suffix, in whichever case, below that of a compression; None for a file that is no source."""
    name = Path(str(path).lower())
    if name.suffix in COMPRESSIONS:
        name = name.with_suffix("")
    return FORMATS.get(name.suffix)


def _inside(directory: Path) -> list[Path]:
    """Texts, JSON lines and parquet below a directory, in order; a .json or .csv may be anything, and must be named itself."""
    if listed := staging.files_below(directory):  # of one dataset, whatever their kind
        return listed
    kinds = ("text", "jsonl", "parquet")
    found = [each for each in _walk(directory) if format_of(each) in kinds]
    if any(format_of(each) != "text" for each in found):  # of a dataset, which its README describes
        found = [each for each in found if each.stem != "README"]
    if not found:
        raise DataError(
            f"--source={directory} holds no {', '.join(key for key in FORMATS if FORMATS[key] in kinds)} file; check the path"
        )
    return found


def _walk(directory: Path) -> list[Path]:
    """Every file, through links to directories too, in the order of the paths; what cannot be read is an error, not a gap."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"--source={error.filename} cannot be read ({error.strerror}); check its permissions") from None

    found, seen = [], set()
    for folder, folders, names in os.walk(directory, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        # Sorted: of several names of one folder it is always the same that counts.
        folders[:] = [] if real in seen else sorted(each for each in folders if not each.startswith("."))
        if real not in seen:
            found += [Path(folder) / name for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(each for each in found if each.is_file() or not each.exists())  # a link to nothing is an error later


def _pinned(path: Path) -> SourceFile:
    try:
        return SourceFile(str(path.absolute()), path.stat().st_size, hash_of(path))
    except OSError as error:
        raise DataError(
            f"--source={path} cannot be read ({error.strerror}); check its permissions, and where it leads if it is a link"
        ) from None


def hash_of(path: Path) -> str:
    """The whole file's sha256 up to 16 MiB, else that of its first and last 8 MiB (a parquet file's footer among them)."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= 2 * _EDGE_BYTES:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        digest = hashlib.sha256(file.read(_EDGE_BYTES))
        file.seek(size - _EDGE_BYTES)
        digest.update(file.read(_EDGE_BYTES))
        return f"edges:{digest.hexdigest()}"


def check_unchanged(local: Path, file: SourceFile) -> None:
    """Raise DataError where the file is no longer what the plan pinned; a download was hashed when it came."""
    if file.format == DEMO:
        if _of_demo() != (file.bytes, file.hash):
            raise DataError("the demo text of this Python differs from the planned one; use one Python on all nodes")
        return
    try:
        same = local.stat().st_size == file.bytes and (file.is_remote or hash_of(local) == file.hash)
    except OSError as error:
        raise DataError(
            f"{local} cannot be read ({error.strerror}); restore it and run the same command again"
        ) from None
    if not same:
        raise DataError(f"{local} changed since the plan was made; restore it, or prepare into another --out")
