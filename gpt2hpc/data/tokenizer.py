"""GPT-2's byte-pair encoding from the ranks shipped in the package: never the network.

The ranks are OpenAI's `r50k_base.tiktoken` (MIT licence; a line is a base64 token and its rank), and the splitting
pattern is the one of tiktoken's `gpt2` encoding.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
from collections.abc import Iterable, Iterator
from importlib import resources

import tiktoken

from gpt2hpc.errors import DataError

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = 50_256
VOCAB_SIZE = 50_257

_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The encoding; DataError where the ranks file is not the published one."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks(),
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def ranks() -> dict[bytes, int]:
    """Every token but the end of text, and its number; DataError where the file is not the published one."""
    return _parse((resources.files("gpt2hpc") / "assets" / "r50k_base.tiktoken").read_bytes())


def _parse(ranks: bytes) -> dict[bytes, int]:
    digest = hashlib.sha256(ranks).hexdigest()
    if digest != RANKS_SHA256:
        raise DataError(
            f"assets/r50k_base.tiktoken has sha256 {digest[:12]}…, not {RANKS_SHA256[:12]}…; reinstall gpt2hpc"
        )
    pairs = (line.split() for line in ranks.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def decode(tokens: list[int]) -> str:
    """Text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
    return gpt2().decode(tokens)


def decode_stream(tokens: Iterable[int]) -> Iterator[str]:
    """The text that `decode` makes of all of them, a part for each token; a character split over tokens comes with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(gpt2().decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)
