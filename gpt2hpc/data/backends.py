"""How documents become tokens: tiktoken is the reference, and gigatoken a faster one that is held to the same tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gpt2hpc.data import tokenizer
from gpt2hpc.data.shards import Tokens
from gpt2hpc.errors import DataError, MissingError

Wanted = Literal["auto", "tiktoken", "gigatoken"]

CHECKED_DOCUMENTS = 100
CHECKED_CHARACTERS = 1_000_000

# The code points that gigatoken 0.10 (Unicode 17) takes for letters or digits and tiktoken 0.14 (Unicode 16) does not, so
# that `'s` after one of them is split otherwise: 4,657, all of them unassigned before Unicode 17. Derived by asking both
# about every code point: an encoding of tiktoken's whose whole pattern is a class (\p{L}, \p{N}, \s) gives nothing for a
# code point outside it; gigatoken's splitter keeps a code point in one piece with a neighbour of its own class.
# As UTF-8, by the first byte, which is fast to look for: U+088F U+0C5C U+0CDC; U+A7CE-A7CF A7D2 A7D4 A7F1; and for
# U+10940-10959 10EC5-10EC7 11DB0-11DDB 11DE0-11DE9 16EA0-16EB8 16EBB-16ED3 16FF2-16FF6 187F8-187FF 18D09-18D1E
# 18D80-18DF2 1E6C0-1E6DE 1E6E0-1E6E2 1E6E4-1E6E5 1E6E7-1E6ED 1E6F0-1E6F4 1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479
# the whole block of 4,096 that each is in, since few texts have any of these.
_DISPUTED = {
    b"\xe0": re.compile(rb"\xe0(?:\xa2\x8f|\xb1\x9c|\xb3\x9c)"),
    b"\xea": re.compile(rb"\xea\x9f[\x8e\x8f\x92\x94\xb1]"),
    b"\xf0": re.compile(rb"\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]"),
}

_SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # as tiktoken's; Python's own has four separators more
_LONGEST_SPACE = 100_000
"""Of a million whitespace characters before another one, tiktoken's `\\s+(?!\\S)` says that its stack is too small."""


class Backend(Protocol):
    """Encodes the documents of one unit; `name` says which program did, and its version, as in `tiktoken 0.14.0`."""

    name: str

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """A uint16 array for each document: END_OF_TEXT, then its tokens; `<|endoftext|>` in a text stays text."""
        ...


def new_backend(wanted: Wanted) -> Backend:
    """A backend for one unit; `auto` is gigatoken where it is installed. MissingError where gigatoken is wanted and is not."""
    if wanted == "tiktoken":
        return Tiktoken()
    try:
        return Gigatoken()
    except ImportError as error:
        if wanted == "auto":
            return Tiktoken()
        raise MissingError(
            f"gigatoken is not installed ({error}): pip install 'gpt2hpc[fast]', or use --tokenizer tiktoken"
        ) from None


class Tiktoken:
    """The reference."""

    def __init__(self) -> None:
        self.name = _name("tiktoken")
        self._encoding = tokenizer.gpt2()

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        return [self.encode_document(text) for text in texts]

    def encode_document(self, text: str) -> Tokens:
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
        return _document(np.concatenate(parts))


class Gigatoken:
    """Some ten times as fast; the unit's first documents are encoded both ways, and those in dispute by the reference only.

    For one unit: its cache grows with every new word, by gigabytes where the words are random. It stays on the calling
    thread, since `Tokenizer.encode`, unlike the batch methods, has no thread pool.

    Raises ImportError where gigatoken is not installed.
    """

    def __init__(self, ranks: Traversable | None = None) -> None:
        from gigatoken import Tokenizer

        self.name = _name("gigatoken")
        self._reference = Tiktoken()  # has checked the ranks of the package
        with resources.as_file(ranks or resources.files("gpt2hpc") / "assets" / "r50k_base.tiktoken") as path:
            # no special tokens: it would find them in any text
            self._tokenizer = Tokenizer.from_tiktoken(path, pretokenizer="gpt2", special_tokens={})
        self._documents = self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Raises DataError where the two differ."""
        return [self._encode_document(text) for text in texts]

    def _encode_document(self, text: str) -> Tokens:
        utf8 = text if text.isascii() else text.encode()
        if isinstance(utf8, bytes) and any(lead in utf8 and each.search(utf8) for lead, each in _DISPUTED.items()):
            return self._reference.encode_document(text)
        if self._documents < CHECKED_DOCUMENTS:
            self._check(text[: CHECKED_CHARACTERS - self._characters])
        return _document(self._tokenizer.encode(utf8))

    def _check(self, text: str) -> None:
        self._documents += 1
        self._characters += len(text)
        if not np.array_equal(_document(self._tokenizer.encode(text)), self._reference.encode_document(text)):
            raise DataError(
                f"{self.name} and {self._reference.name} encode the text {text[:40]!r}… differently; use --tokenizer tiktoken"
            )


def _parts(text: str, longest: int = _LONGEST_SPACE) -> Iterator[str]:
    """A text cut where GPT-2's pattern cuts it too: before the last of more than `longest` whitespace characters within it."""
    start = 0
    for run in _SPACE.finditer(text) if len(text) > longest else ():
        if run.end() - run.start() > longest and run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def _name(package: str) -> str:
    return f"{package} {metadata.version(package)}"


def _document(tokens: npt.NDArray[np.integer[Any]]) -> Tokens:
    document = np.empty(len(tokens) + 1, dtype=np.uint16)
    document[0] = tokenizer.END_OF_TEXT
    document[1:] = tokens
    return document
