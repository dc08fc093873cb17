from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2hpc.data import backends, tokenizer
from gpt2hpc.data.backends import Backend, Gigatoken, Tiktoken, new_backend
from gpt2hpc.errors import DataError, MissingError

REFERENCE = Tiktoken()
DISPUTED_LETTERS = (
    "\u088f\u0c5c\u0cdc\ua7ce\ua7f1\U00010940\U00011de0\U00018d80\U0001e6c0\U0002b73a\U000323b0\U00033479"
)


@pytest.fixture(scope="module")
def installed() -> None:
    if importlib.util.find_spec("gigatoken") is None:
        fail_or_skip = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        fail_or_skip("gigatoken is not installed: pip install -e '.[fast]'")


@pytest.fixture(scope="module")
def unchecked(installed: None) -> Backend:
    """gigatoken with what it is always guarded by, less the check of the first documents."""
    backend = Gigatoken()
    backend._documents = backends.CHECKED_DOCUMENTS
    return backend


@pytest.fixture
def liar(installed: None, tmp_path: Path) -> Gigatoken:
    """A real gigatoken whose ranks have ` t` and ` a` the other way round."""
    lines = (resources.files("gpt2hpc") / "assets" / "r50k_base.tiktoken").read_text().splitlines()
    (first, rank), (second, next_rank) = lines[256].split(), lines[257].split()
    lines[256:258] = [f"{second} {rank}", f"{first} {next_rank}"]
    (tmp_path / "other.tiktoken").write_text("\n".join(lines) + "\n")
    return Gigatoken(tmp_path / "other.tiktoken")


def assert_same(backend: Backend, texts: list[str]) -> None:
    for text, found, wanted in zip(texts, backend.encode(texts), REFERENCE.encode(texts), strict=True):
        assert np.array_equal(found, wanted), text


def test_the_reference_is_the_tokenizer() -> None:
    for text in ("", "Hello, world!", "<|endoftext|> stays text", "naïve 🙂 don't", " \n\n "):
        (found,) = new_backend("tiktoken").encode([text])
        assert found.dtype == np.uint16
        assert found.tolist() == [tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(text)]


def test_names_say_program_and_version(installed: None) -> None:
    for wanted in ("tiktoken", "gigatoken"):
        program, version = new_backend(wanted).name.split()
        assert program == wanted
        assert version[0].isdigit()
    assert new_backend("auto").name.startswith("gigatoken ")


def test_without_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert new_backend("auto").name.startswith("tiktoken ")
    with pytest.raises(MissingError, match=r"gigatoken is not installed.*pip install 'gpt2hpc\[fast\]'"):
        new_backend("gigatoken")


@pytest.mark.parametrize(
    "text", ["", " ", "<|endoftext|>", "a <|endoftext|> b<|endoftext|>", "\0", "a" * 50_000, " " * 50_000]
)
def test_gigatoken_on_odd_texts(unchecked: Backend, text: str) -> None:
    assert_same(unchecked, [text])
    assert unchecked.encode([text])[0].dtype == np.uint16
    assert unchecked.encode([]) == []


def test_gigatoken_on_every_code_point(unchecked: Backend) -> None:
    """Those in dispute by themselves, since a document that holds one is the reference's."""
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    disputed = [letter for letter in everything if _is_disputed(letter)]
    others = sorted(set(everything) - set(disputed))
    assert set(DISPUTED_LETTERS) <= set(disputed)
    for letters in (disputed, others):
        for template in ("{0}'s\n", " {0}{0}'ll 1{0}2"):
            for start in range(0, len(letters), 1000):
                assert_same(unchecked, ["".join(map(template.format, letters[start : start + 1000]))])


def _is_disputed(letter: str) -> bool:
    return any(each.search(letter.encode()) for each in backends._DISPUTED.values())


@pytest.mark.parametrize("space", [" ", "\n", "\u2003", "\n "])
def test_a_million_spaces(unchecked: Backend, space: str) -> None:
    """Which tiktoken alone cannot split."""
    run = space * (1_000_000 // len(space))
    assert_same(unchecked, [f"a{run}{end}" for end in ("b", " b", "\n.", "\x1c", "'s", "", f"b{run}")])


def test_gigatoken_on_prose(unchecked: Backend) -> None:
    assert_same(unchecked, [text for _, text in sorted(pydoc_data.topics.topics.items())])
    sources = sorted(
        Path(__file__).parents[2].rglob("*.py")
    )  # also of libraries that are installed here, not all of them UTF-8
    assert_same(unchecked, [path.read_text(encoding="utf-8", errors="replace") for path in sources])


PIECES = st.one_of(
    st.text(),
    st.text(st.characters(categories=["L", "N", "Cn"])),
    st.sampled_from(["'s", "'t", "'re", "'LL", "’s", "''", " ", "  ", "\n", "\r\n"]),
    st.sampled_from(["\u00a0", "\u2003", "\u200b", "e\u0301", "<|endoftext|>"]),
    st.sampled_from(DISPUTED_LETTERS),
)


SPACES = st.text(st.sampled_from(" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000"), max_size=6)


@settings(max_examples=1000, deadline=None)
@given(pieces=st.lists(PIECES, max_size=30))
def test_gigatoken_on_any_text(unchecked: Backend, pieces: list[str]) -> None:
    assert_same(unchecked, ["".join(pieces)])


def test_a_cut_before_the_last_space_changes_no_token_by_any_code_point() -> None:
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(letters), 1000):
        assert_same_if_cut(
            "".join(f"a{each} {each}{each}b \n{each}\nc\n\n{each}" for each in letters[start : start + 1000])
        )


@settings(max_examples=1000, deadline=None)
@given(pieces=st.lists(st.one_of(PIECES, SPACES), max_size=30))
def test_a_cut_before_the_last_space_changes_no_token(pieces: list[str]) -> None:
    assert_same_if_cut("".join(pieces))


def assert_same_if_cut(text: str) -> None:
    parts = list(backends._parts(text, longest=1))
    assert "".join(parts) == text
    encode = tokenizer.gpt2().encode_ordinary
    assert [token for part in parts for token in encode(part)] == encode(text), text


def test_a_unit_whose_tokens_differ_fails(liar: Gigatoken) -> None:
    liar.encode(["Nothing to see", ""])
    with pytest.raises(DataError, match=r"gigatoken \d.* and tiktoken \d.* 'Such a.*--tokenizer tiktoken"):
        liar.encode(["Such a lie"])


def test_the_first_documents_are_checked(liar: Gigatoken) -> None:
    lie = ["Such a lie"]
    liar.encode(["fine"] * (backends.CHECKED_DOCUMENTS - 1))
    with pytest.raises(DataError):
        liar.encode(lie)
    assert not np.array_equal(liar.encode(lie)[0], REFERENCE.encode(lie)[0])


def test_of_a_long_document_the_beginning_is_checked(liar: Gigatoken) -> None:
    liar.encode(["fine " * (backends.CHECKED_CHARACTERS // 5) + "Such a lie"])
    liar.encode(["Such a lie"])


def test_a_text_with_a_disputed_letter_is_the_references(liar: Gigatoken) -> None:
    assert_same(liar, [f"Such a lie, {letter}'s" for letter in DISPUTED_LETTERS])
    with pytest.raises(DataError):
        liar.encode(["Such a lie’s, 🙂 हिन्दी 한국어 𝒜"])


def test_one_thread(installed: None) -> None:
    program = """
import os
from gpt2hpc.data.backends import new_backend
before = len(os.listdir("/proc/self/task"))
backend = new_backend("gigatoken")
backend.encode(["It's the words — and 123 " * 40] * 2000 + ["It's the words " * 500_000])
print(len(os.listdir("/proc/self/task")) - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "0\n"
