"""GPT-2's tokenizer as files of the transformers library, made from the ranks in the package: no network.

A token's rank is its number, and the order in which merges are tried. So the merge that makes a token is what byte-pair
encoding with the lower ranks leaves of it: two parts. `vocab.json` and `merges.txt` come out as OpenAI published them, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from gpt2hpc.data import tokenizer
from gpt2hpc.model.hf_weights import quiet_transformers

END_OF_TEXT = "<|endoftext|>"


def write(directory: Path, *, block_size: int) -> None:
    """Write what `AutoTokenizer.from_pretrained(directory)` reads, beside a GPT-2's config.json."""
    from transformers import AutoTokenizer

    ranks = tokenizer.ranks()
    letters = _letters()

    def spelt(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    vocabulary = {**{spelt(token): ranks[token] for token in ordered}, END_OF_TEXT: tokenizer.END_OF_TEXT}
    merges = [_parts(token, ranks) for token in ordered if len(token) > 1]
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = [f"{spelt(left)} {spelt(right)}\n" for left, right in merges]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(lines), encoding="utf-8")
    with quiet_transformers():
        made = AutoTokenizer.from_pretrained(directory, local_files_only=True, model_max_length=block_size)
        made.save_pretrained(directory)


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are merged into `token` of two bytes or more."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda at: ranks.get(parts[at] + parts[at + 1], ranks[token]))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _letters() -> list[str]:
    """A visible letter for each byte, as in GPT-2's `encoder.py`: itself where it is one, else the next from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
