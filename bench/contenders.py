"""Ways to make GPT-2 tokens of a directory with one `text.parquet`: each returns how many tokens it made."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpt2hpc.data import encode, plan, sources, tokenizer
from gpt2hpc.data.backends import Backend, new_backend
from gpt2hpc.data.plan import Reading
from gpt2hpc.data.sources import Selection

END_OF_TEXT = "<|endoftext|>"
Contender = Callable[[Path, Sequence[str]], int]


def write_parquet(directory: Path, documents: Sequence[str]) -> None:
    pq.write_table(pa.table({"text": documents}), directory / "text.parquet", row_group_size=1000)


def ours(directory: Path, backend: Backend) -> int:
    """What `gpt2hpc prepare` does with one unit: pin, read, tokenize, hash, write, fsync; in this process, so without its start."""
    out = directory / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    files = sources.find_files([str(directory / "text.parquet")], Selection())
    one_unit = dataclasses.replace(plan.make(files, Reading(), None, unit_tokens=10**12), val_fraction=None)
    record = encode.encode_unit(out, one_unit, one_unit.units[0], backend=backend, locate=lambda file: Path(file.path))
    assert record is not None
    return sum(shard.tokens for shard in record.shards)


def seed_loop(directory: Path, documents: Sequence[str]) -> int:
    """The loop of build-nanogpt's fineweb.py, of texts in memory: nothing is read or written."""
    encoding, total = tokenizer.gpt2(), 0
    for text in documents:
        tokens = [tokenizer.END_OF_TEXT]
        tokens.extend(encoding.encode_ordinary(text))
        array = np.array(tokens)
        assert (array >= 0).all()
        assert (array < 2**16).all()
        total += len(array.astype(np.uint16))
    return total


def tiktoken_alone(directory: Path, documents: Sequence[str]) -> int:
    """Its fastest call, of texts in memory: nothing is read or written."""
    encoding = tokenizer.gpt2()
    return sum(1 + len(encoding.encode_to_numpy(text, disallowed_special=())) for text in documents)


def ours_with_tiktoken(directory: Path, documents: Sequence[str]) -> int:
    return ours(directory, new_backend("tiktoken"))


def ours_with_gigatoken(directory: Path, documents: Sequence[str]) -> int:
    return ours(directory, new_backend("gigatoken"))


def datatrove(directory: Path, documents: Sequence[str]) -> int:
    """From the parquet file to its .ds file: one task, without the shuffle of documents."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.disable("datatrove")
    out = directory / "datatrove"
    shutil.rmtree(out, ignore_errors=True)
    ranks = directory / "tokenizer.json"
    ranks.write_text(_tokenizer_json())
    LocalPipelineExecutor(
        [
            ParquetReader(str(directory), glob_pattern="text.parquet"),
            DocumentTokenizer(str(out), str(ranks), eos_token=END_OF_TEXT, shuffle_documents=False),
        ],
        workers=1,
        logging_dir=str(out / "logs"),
    ).run()
    return sum(path.stat().st_size for path in out.glob("*.ds")) // 2


@functools.cache
def _tokenizer_json() -> str:
    """The same ranks as Hugging Face's tokenizer file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    encoding = tokenizer.gpt2()
    ranks = {encoding.decode_single_token_bytes(token): token for token in range(tokenizer.END_OF_TEXT)}
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    halves = [_halves(token, ranks) for token in ranks if len(token) > 1]
    merges = [(spelled[left], spelled[right]) for left, right in halves]
    model = models.BPE({spelled[token]: rank for token, rank in ranks.items()}, merges)
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END_OF_TEXT)])
    assert made.token_to_id(END_OF_TEXT) == tokenizer.END_OF_TEXT
    return str(made.to_str())


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The pair that the merge of `token` joins: what merges of lower rank make of its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@functools.cache
def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return [chr(code) for _, code in sorted([*zip(printable, printable), *zip(others, range(256, 512))])]  # noqa: B905


def contenders() -> dict[str, Contender]:
    """Those that are installed, the seed's loop first."""
    found: dict[str, Contender] = {
        "seed-style loop (no I/O)": seed_loop,
        "tiktoken encode_to_numpy (no I/O)": tiktoken_alone,
        "gpt2hpc, tiktoken (parquet to shard)": ours_with_tiktoken,
    }
    if importlib.util.find_spec("gigatoken"):
        found["gpt2hpc, gigatoken (parquet to shard)"] = ours_with_gigatoken
    if importlib.util.find_spec("datatrove"):
        found["datatrove (parquet to .ds)"] = datatrove
    return found
