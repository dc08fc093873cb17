"""Any data that can be trained on as a manifest: a prepared directory, shards of other tools, or either on the Hub."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from gpt2hpc.data import hub, manifest, plan, tokenizer
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.shards import BIN_HEADER_BYTES, BIN_MAGIC, BIN_VERSION, AbsentError, Shard, Split
from gpt2hpc.errors import DataError

_SPLIT = re.compile(r"(?:^|[_-])(train|val)(?=[_.-]|$)")
ReadStart = Callable[[str, int], bytes]


def load(where: str) -> Manifest:
    """The data at `where`: a directory, or `hf://datasets/USER/NAME[@REVISION]`, whose commit is pinned in the result.

    Raises DataError where there is nothing to train on, or it contradicts itself.
    """
    if where.startswith("hf:") and not hub.is_remote(where):
        raise DataError(
            f"data.dir={where} is no dataset on the Hub; write {hub.SCHEME}USER/NAME or {hub.SCHEME}USER/NAME@REVISION"
        )
    return _from_hub(hub.parse(where)) if hub.is_remote(where) else _from_directory(Path(where))


def _from_directory(directory: Path) -> Manifest:
    if (directory / manifest.NAME).is_file():
        return manifest.read(directory / manifest.NAME, str(directory))
    if (directory / plan.NAME).is_file():
        raise DataError(
            f"{directory} is not finished: it holds a {plan.NAME} but no {manifest.NAME}; run `gpt2hpc prepare --out {directory}`"
        )
    files = [hub.HubFile(path.name, path.stat().st_size) for path in sorted(directory.glob("*")) if path.is_file()]

    def read_start(name: str, count: int) -> bytes:
        with (directory / name).open("rb") as file:
            return file.read(count)

    shards = _of_others(files, read_start)
    if not shards:
        where = "" if directory.is_absolute() else f" ({directory.absolute()})"
        raise AbsentError(
            f"data.dir={directory} holds no {manifest.NAME}{where}, nor *_train_*.npy or .bin shards",
            f"; make it with `gpt2hpc prepare --source … --out {directory}`",
        )
    edges = {shard.file: _edges(directory / shard.file) for shard in shards}
    return Manifest(str(directory), shards, tokenizer.VOCAB_SIZE, {"edges": edges})


def _edges(path: Path, count: int = 1 << 16) -> str:
    """Tells shards apart that nobody has hashed, at little cost: the sha256 of their first and last 64 KiB."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(count))
        file.seek(max(0, path.stat().st_size - count))
        digest.update(file.read(count))
    return digest.hexdigest()


def _from_hub(dataset: hub.Repository) -> Manifest:
    dataset = hub.pinned(dataset)
    files = hub.listing(dataset)
    if any(file.path == manifest.NAME for file in files):
        with hub.fetched(dataset, manifest.NAME) as path:
            return manifest.read(path, str(dataset))
    shards = _of_others(files, lambda name, count: hub.read_start(dataset, name, count))
    if not shards:
        raise DataError(
            f"data.dir={dataset} holds no {manifest.NAME}, nor *_train_*.npy or .bin shards; choose other data"
        )
    return Manifest(str(dataset), shards, tokenizer.VOCAB_SIZE)


def _of_others(files: Iterable[hub.HubFile], read_start: ReadStart) -> tuple[Shard, ...]:
    """Shards by their names, `edufineweb_train_000001.npy` or `fineweb_val_000000.bin`; one header is read, the sizes tell the rest."""
    headers: dict[str, int] = {}
    found = []
    for file in sorted(files, key=lambda file: file.path):
        suffix, split = Path(file.path).suffix, _split_of(Path(file.path).stem)
        if suffix not in (".npy", ".bin") or split is None:
            continue
        if suffix not in headers:
            headers[suffix] = _header_bytes(file.path, read_start(file.path, BIN_HEADER_BYTES))
        tokens, rest = divmod(file.bytes - headers[suffix], 2)
        if rest or tokens < 0:
            raise DataError(f"{file.path} has {file.bytes} bytes, no whole number of uint16 tokens; fetch it again")
        found.append(Shard(file.path, split, tokens, None, file.bytes, file.sha256))
    return tuple(found)


def _split_of(stem: str) -> Split | None:
    match = _SPLIT.search(stem)
    return None if match is None else "train" if match[1] == "train" else "val"


def _header_bytes(name: str, start: bytes) -> int:
    """Bytes before the tokens; DataError for what holds no uint16 tokens."""
    if name.endswith(".bin"):
        magic, version = struct.unpack_from("<2i", start) if len(start) >= 8 else (0, 0)
        if (magic, version) != (BIN_MAGIC, BIN_VERSION):
            raise DataError(
                f"{name} has no header of llm.c's GPT-2 .bin (magic {BIN_MAGIC}, version {BIN_VERSION}); convert it"
            )
        return BIN_HEADER_BYTES
    import io

    try:
        version = np.lib.format.read_magic(io.BytesIO(start))
        buffer = io.BytesIO(start[8:])
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(buffer)
    except ValueError as error:
        raise DataError(f"{name} is no .npy file ({error}); fetch it again") from None
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise DataError(f"{name} holds {dtype} {shape}, not a row of uint16 tokens; convert it")
    return 8 + buffer.tell()
