"""Real English prose that is already on the machine, each paragraph once, as documents of a web page's length."""

from __future__ import annotations

import ast
import gzip
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DOCUMENT_CHARACTERS = 4000
_SUFFIXES = {".txt", ".rst", ".md", ".text", ""}
_NO_PROSE = ("changelog", "news", "md5sums", "sources", "top_level")


@dataclass
class Found:
    """Documents, and how many bytes came from each kind of text."""

    documents: list[str] = field(default_factory=list)
    bytes_by_kind: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_kind.values())

    def add(self, kind: str, paragraphs: Iterable[str]) -> None:
        # one that spells the special token is not everybody's text: Hugging Face's tokenizers read the token
        documents = list(_packed(each for each in paragraphs if "<|endoftext|>" not in each))
        self.documents += documents
        self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + sum(len(each.encode()) for each in documents)


def collect(megabytes: float) -> Found:
    """Up to so many megabytes; less where the machine has less."""
    found = Found()
    seen: set[str] = set()
    for kind, texts in _kinds():
        held: list[str] = []
        for text in texts:
            if found.bytes >= megabytes * 1e6:
                return found
            new = [each for each in dict.fromkeys(_paragraphs(text)) if each not in seen and _is_prose(each)]
            seen.update(new)
            held += new
            if sum(map(len, held)) >= DOCUMENT_CHARACTERS:
                found.add(kind, held)
                held = []
        found.add(kind, held)
    return found


def read(files: Iterable[Path]) -> Found:
    """All the text of these files."""
    found = Found()
    for file in files:
        found.add("files", _paragraphs(file.read_text(encoding="utf-8")))
    return found


def _packed(paragraphs: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    characters = 0
    for paragraph in paragraphs:
        held.append(paragraph)
        characters += len(paragraph)
        if characters >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(held)
            held, characters = [], 0
    if held:
        yield "\n\n".join(held)


def _paragraphs(text: str) -> list[str]:
    return [each.strip("\n") for each in text.split("\n\n") if each.strip()]


def _is_prose(paragraph: str) -> bool:
    """A sentence or more: words of ordinary length, hardly anything else."""
    words = paragraph.split()
    plain = sum(letter.isalpha() or letter in " \n.,'" for letter in paragraph)
    return 12 <= len(words) <= 2000 and plain >= 0.9 * len(paragraph) and 3 <= sum(map(len, words)) / len(words) <= 8


def _kinds() -> Iterator[tuple[str, Iterator[str]]]:
    paths = sysconfig.get_paths()
    libraries = [Path(paths["stdlib"]), Path(paths["purelib"]), Path("/usr/lib/python3/dist-packages")]
    manuals = [Path("/usr/share/doc"), Path("/usr/share/common-licenses"), Path("/usr/share/perl"), *libraries]
    yield "Python's topics", (text for _, text in sorted(pydoc_data.topics.topics.items()))
    yield "manuals, readmes and licences", _manuals(manuals)
    yield "docstrings", _docstrings(libraries)


def _manuals(roots: Iterable[Path]) -> Iterator[str]:
    for path in (path for root in roots for path in sorted(root.rglob("*"))):
        name = path.with_suffix("") if path.suffix == ".gz" else path
        if name.suffix not in _SUFFIXES or name.name.lower().startswith(_NO_PROSE) or not path.is_file():
            continue
        try:
            contents = path.read_bytes()
            yield (gzip.decompress(contents) if path.suffix == ".gz" else contents).decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue


def _docstrings(roots: Iterable[Path]) -> Iterator[str]:
    for path in (path for root in roots for path in sorted(root.rglob("*.py"))):
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        yield "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented))
