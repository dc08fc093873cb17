"""Files that are either there in full or not at all: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def fsync_dir(path: Path) -> None:
    """Make renames and new names inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process, on any node or in any container, uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` in one step at the end of the block; an exception leaves `path` as it was."""
    temporary = temporary_name(path)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def publish_bytes(path: Path, contents: bytes | memoryview) -> None:
    """Replace `path` by `contents` in one step; a reader sees the old or the new, never a part."""
    with publishing(path) as file:
        file.write(contents)


def leftovers(directory: Path) -> Iterator[Path]:
    """Temporary files in `directory` of writers that were killed, or that write at this moment."""
    yield from directory.glob(".*.tmp")


def publish_text(path: Path, text: str) -> None:
    publish_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes | memoryview) -> None:
    """Write and fsync `path` itself; for a file whose folder is published later."""
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def create_text(path: Path, text: str) -> bool:
    """Create `path` with `text` unless it exists; of several callers on any node exactly one gets True.

    A hard link is the one creation that is exclusive on NFS and Lustre and shows the contents whole.
    """
    temporary = temporary_name(path)
    try:
        write_bytes(temporary, text.encode())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return True


def publish_json(path: Path, value: Any) -> None:
    publish_text(path, to_json(value))


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=False) + "\n"


def read_json(path: Path) -> Any | None:
    """The parsed file, or None where it is absent or not JSON (a file of another tool, a disk that lies)."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
