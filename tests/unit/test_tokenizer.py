from __future__ import annotations

import socket

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from gpt2hpc.data import tokenizer
from gpt2hpc.errors import DataError


def test_known_tokens() -> None:
    """Tokens that OpenAI's encoder gives for GPT-2."""
    assert tokenizer.gpt2().encode_ordinary("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.gpt2().encode_ordinary(" \n\n  def f(x):\t# naïve") == [
        220, 198, 198, 220, 825, 277, 7, 87, 2599, 197, 2, 41492, 425,
    ]  # fmt: skip
    assert tokenizer.gpt2().n_vocab == tokenizer.VOCAB_SIZE


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
    tokens = tokenizer.encode_document("a<|endoftext|>b")
    assert tokens.dtype == np.uint16
    assert tokens[0] == tokenizer.END_OF_TEXT
    assert tokenizer.END_OF_TEXT not in tokens[1:]
    assert tokenizer.decode(tokens[1:].tolist()) == "a<|endoftext|>b"


@given(st.text())
def test_round_trip(text: str) -> None:
    tokens = tokenizer.encode_document(text)
    assert tokenizer.decode(tokens[1:].tolist()) == text
    assert tokens[1:].tolist() == tokenizer.gpt2().encode_ordinary(text)


def test_tiktoken_has_the_api() -> None:
    assert hasattr(tiktoken.Encoding, "encode_to_numpy")
