"""Documents out of the pieces of files, in order; one that cannot be read comes as `Bad` in its place."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpt2hpc.data.demo import demo_documents
from gpt2hpc.data.plan import Piece, Reading
from gpt2hpc.data.sources import SourceFile
from gpt2hpc.errors import DataError


@dataclass(frozen=True)
class Bad:
    """A document that cannot be read: its place (file and line, row or byte) and why."""

    where: str
    why: str


Document = str | Bad
_ROWS = 1024


def documents(file: SourceFile, local: Path, piece: Piece, reading: Reading) -> Iterator[Document]:
    """The documents of a piece of `file`, which lies at `local`; DataError where not even documents can be told apart."""
    if file.format == "demo":
        return iter(demo_documents())
    return _guarded(local, _READERS[file.format](_Place(file, local, piece), reading))


@dataclass(frozen=True)
class _Place:
    file: SourceFile
    local: Path
    piece: Piece

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        if self.file.compression is None:
            with self.local.open("rb") as file:
                yield file
            return
        import pyarrow as pa

        # Arrow reads all members of a .gz and all frames of a .zst, and notices a truncated one.
        with pa.input_stream(str(self.local), compression=self.file.compression) as stream:
            yield io.BufferedReader(stream, 1 << 20)


def _guarded(local: Path, found: Iterator[Document]) -> Iterator[Document]:
    """Truncated gzip, a torn parquet page, no CSV at all: there is no telling what is lost, so the unit must fail."""
    try:
        yield from found
    except (OSError, ValueError, EOFError, zlib.error) as error:  # Arrow's and pandas's errors too
        raise DataError(
            f"{local} cannot be read: {' '.join(str(error).split())}; mend it, or fetch it again"
        ) from error


# Text ---------------------------------------------------------------------------------------------------------------


def _text(place: _Place, reading: Reading) -> Iterator[Document]:
    if reading.separator == "blank-line":
        yield from _paragraphs(place)
        return
    with place.open() as file:
        found = _decoded(file.read(), str(place.local))
    if isinstance(found, Bad) or found.strip():
        yield found


def _paragraphs(place: _Place) -> Iterator[Document]:
    """Paragraphs whose preceding blank line begins in the piece; the first of a file has none."""
    start, stop = place.piece.start, place.piece.stop
    with place.open() as file:
        position = _first_line(file, start)
        began, inside, lines = position, start == 0, list[bytes]()
        for line in file:
            if line.strip():
                if inside:
                    began = began if lines else position
                    lines.append(line)
            else:
                if lines:
                    yield _decoded(b"".join(lines).rstrip(b"\r\n"), f"{place.local} at byte {began}")
                    lines = []
                if position >= stop and not place.file.compression:
                    return
                inside = True
            position += len(line)
        if lines:
            yield _decoded(b"".join(lines).rstrip(b"\r\n"), f"{place.local} at byte {began}")


def _first_line(file: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or later; returns its position."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _decoded(contents: bytes, where: str) -> Document:
    try:
        text = contents.decode("utf-8-sig")  # a byte order mark is no part of the text
        return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads a text file
    except UnicodeDecodeError as error:
        return Bad(where, f"is not UTF-8 at byte {error.start} of it; convert it, as with iconv -t UTF-8")


# Records ------------------------------------------------------------------------------------------------------------


def _jsonl(place: _Place, reading: Reading) -> Iterator[Document]:
    """Lines that begin in the piece."""
    stop, compressed = place.piece.stop, place.file.compression is not None
    with place.open() as file:
        begun = position = _first_line(file, place.piece.start)
        lines_before = functools.cache(lambda: _lines_before(place.local, begun))  # only if a line is bad
        for number, line in enumerate(file, start=1):
            if position >= stop and not compressed:
                return
            if line.strip():
                found = _record(line, reading.text_key)
                if isinstance(found, Bad):
                    found = Bad(f"{place.local}:{number + lines_before()}", found.why)
                yield found
            position += len(line)


def _lines_before(path: Path, position: int) -> int:
    with path.open("rb") as file:
        return sum(file.read(min(1 << 20, position - at)).count(b"\n") for at in range(0, position, 1 << 20))


def _record(line: bytes, text_key: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad("", f"is not JSON ({error}); mend or remove the line")
    return _checked(record.get(text_key) if isinstance(record, dict) else None, "", text_key)


def _parquet(place: _Place, reading: Reading) -> Iterator[Document]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(place.local, memory_map=False) as file:
        for group in range(place.piece.start, place.piece.stop):
            row = 0
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[reading.text_key]):
                for text in _values(batch.column(0)):
                    if type(text) is not str:
                        text = _checked(text, f"{place.local} row group {group} row {row}", reading.text_key)
                    yield text
                    row += 1


def _values(column: Any) -> list[Any]:
    """Texts; the bytes of those that are not UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        texts: list[Any] = column.to_pylist()
        return texts
    return [_value(value) for value in column]


def _value(value: Any) -> Any:
    with contextlib.suppress(UnicodeDecodeError):
        return value.as_py()
    return value.as_buffer().to_pybytes()


def _table(place: _Place, reading: Reading) -> Iterator[Document]:
    """CSV, TSV, JSON and Arrow files, by the `datasets` library."""
    from datasets import load_dataset, logging
    from tqdm import tqdm

    logging.set_verbosity(logging.CRITICAL)  # errors come as exceptions too
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the system, for all processes
    suffix = Path(place.file.path.lower().removesuffix(".gz")).suffix
    builder = {".csv": "csv", ".tsv": "csv", ".json": "json", ".arrow": "arrow"}[suffix]
    options: dict[str, Any] = {}
    if builder == "csv":  # a text that reads NA is a text
        options = {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False, "na_filter": False}
    name = glob.escape(str(place.local))  # it takes patterns
    try:
        rows = load_dataset(builder, data_files=name, split="train", streaming=True, **options)
    except StopIteration:  # of an empty file
        raise ValueError(f"it holds no {builder}") from None
    for number, row in enumerate(rows):
        yield _checked(row.get(reading.text_key), f"{place.local} row {number}", reading.text_key)


def _checked(text: Any, where: str, text_key: str) -> Document:
    if isinstance(text, bytes):
        return _decoded(text, where)
    if not isinstance(text, str):
        return Bad(where, f"has no text under the key {text_key!r}; name the right one with --text-key")
    try:
        text.encode()
    except UnicodeEncodeError:  # legal JSON, as in "\\ud800", but no text
        return Bad(where, "holds half a surrogate pair; mend or remove it")
    return text


_READERS: dict[str, Callable[[_Place, Reading], Iterator[Document]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "table": _table,
}
