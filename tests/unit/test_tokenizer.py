from __future__ import annotations

import itertools
import socket

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from gpt2hpc.data import tokenizer
from gpt2hpc.data.backends import Tiktoken
from gpt2hpc.errors import DataError


def plain_bpe(text: str) -> list[int]:
    """GPT-2's encoding as its paper's code does it: split, then merge the pair of lowest rank until none is left."""
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ranks = tokenizer.gpt2()._mergeable_ranks
    tokens = []
    for piece in pattern.findall(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
            if min(pairs) == 1 << 30:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        tokens += [ranks[part] for part in parts]
    return tokens


def test_known_tokens() -> None:
    assert tokenizer.gpt2().encode_ordinary("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.gpt2().n_vocab == tokenizer.VOCAB_SIZE


@pytest.mark.parametrize(
    "text",
    [
        " \n\n  def f(x):\t# naïve café\n\n",
        "We'll see what it's like; they'd've said 'Tis 12345 times… 日本語 and 🙂🙃!",
        "trailing spaces   \n\t\r\n   ",
        "<|endoftext|>",
    ],
)
def test_it_is_byte_pair_encoding(text: str) -> None:
    assert tokenizer.gpt2().encode_ordinary(text) == plain_bpe(text)


def test_the_published_ranks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="reinstall gpt2hpc"):
        tokenizer._parse(b"IQ== 0\n")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the tokenizer went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    tokenizer.gpt2.cache_clear()
    assert tokenizer.decode([15496]) == "Hello"


def test_the_pattern_is_tiktokens() -> None:
    import tiktoken_ext.openai_public as published

    assert published.r50k_pat_str == tokenizer._PATTERN


def test_end_of_text_comes_first_and_only_from_us() -> None:
    tokens = Tiktoken().encode_document("a<|endoftext|>b")
    assert tokens.dtype == np.uint16
    assert tokens[0] == tokenizer.END_OF_TEXT
    assert tokenizer.END_OF_TEXT not in tokens[1:]
    assert tokenizer.decode(tokens[1:].tolist()) == "a<|endoftext|>b"


@given(st.text())
def test_round_trip(text: str) -> None:
    tokens = Tiktoken().encode_document(text)
    assert tokenizer.decode(tokens[1:].tolist()) == text
    assert tokens[1:].tolist() == tokenizer.gpt2().encode_ordinary(text)


def test_tiktoken_has_the_api() -> None:
    assert hasattr(tiktoken.Encoding, "encode_to_numpy")
