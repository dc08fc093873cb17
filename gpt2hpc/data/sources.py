"""Where documents come from: text files, JSONL files, and the demo text that every Python carries.

A source becomes units: groups of documents that are tokenized on their own, so that any number of tasks may share them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2hpc.errors import DataError

Separator = Literal["file", "blank-line"]

UNIT_BYTES = 400_000_000
"""Text of a unit: about 100M tokens, a shard of 200 MB."""

_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


@dataclass(frozen=True)
class SourceFile:
    """One input and what pins it: its size in bytes and its sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Unit:
    """Files that are tokenized together, in order."""

    index: int
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Reading:
    """How files are cut into documents: text at `separator`, JSONL by its `text_key`."""

    separator: Separator = "file"
    text_key: str = "text"


def find_units(sources: Sequence[str], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of `demo`, files and directories, the same ones whatever the order of a directory's listing.

    Raises DataError for a source that is missing, or a directory that holds no text.
    """
    files = [file for source in sources for file in _files(source)]
    groups: list[list[SourceFile]] = [[]]
    filled = 0
    for file in files:
        if groups[-1] and filled + file.bytes > unit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += file.bytes
    return [Unit(index, tuple(group)) for index, group in enumerate(groups)]


def documents(unit: Unit, reading: Reading) -> Iterator[str]:
    """The texts of a unit; DataError, naming the place, for one that cannot be read."""
    for file in unit.files:
        if file.path == "demo":
            yield from demo_documents()
        elif file.path.endswith(_JSONL_SUFFIXES):
            yield from _jsonl_documents(Path(file.path), reading.text_key)
        else:
            yield from _text_documents(Path(file.path), reading.separator)


def _files(source: str) -> list[SourceFile]:
    if source == "demo":
        text = "\0".join(demo_documents()).encode()
        return [SourceFile("demo", len(text), hashlib.sha256(text).hexdigest())]
    path = Path(source)
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix in _TEXT_SUFFIXES + _JSONL_SUFFIXES)
        if not found:
            raise DataError(
                f"--source={source} holds no {', '.join(_TEXT_SUFFIXES + _JSONL_SUFFIXES)} file; check the path"
            )
        return [_pinned(each) for each in found]
    if not path.is_file():
        raise DataError(f"--source={source} does not exist; give a text or JSONL file, a directory of them, or `demo`")
    return [_pinned(path)]


def _pinned(path: Path) -> SourceFile:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"--source={path} cannot be read ({error.strerror}); check its permissions") from None
    return SourceFile(str(path), path.stat().st_size, digest)


def _text_documents(path: Path, separator: Separator) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it, as with iconv -t UTF-8") from None
    pieces = re.split(r"\n[ \t]*\n\s*", text) if separator == "blank-line" else [text]
    yield from (piece for piece in pieces if piece.strip())


def _jsonl_documents(path: Path, text_key: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not JSON ({error}); mend or remove the line") from None
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                raise DataError(
                    f"{path}:{number} has no text under the key {text_key!r}; name the right one with --text-key"
                )
            try:
                record[text_key].encode()
            except UnicodeEncodeError:  # legal JSON, as in "\\ud800", but no text
                raise DataError(f"{path}:{number} holds half a surrogate pair; mend or remove the line") from None
            if record[text_key].strip():
                yield record[text_key]


def demo_documents() -> Iterator[str]:
    """The running Python's own documentation: the language reference's topics, then the library's docstrings."""
    import pydoc_data.topics

    yield from (text for _, text in sorted(pydoc_data.topics.topics.items()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if _NO_LIBRARY.isdisjoint(path.relative_to(library).parts) and (text := _docstrings(path)):
            yield text


def _docstrings(path: Path) -> str:
    """All docstrings of a file, each below the name of what it documents."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a test of syntax errors
        return ""
    named = (
        (getattr(node, "name", path.stem), ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return "\n\n".join(f"{name}\n{text}" for name, text in named if text)
