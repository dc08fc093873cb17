"""Whether a process still lives: by looking where it can be seen, from another node by whether its heartbeat moves."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from gpt2hpc import durable

BEAT_S = 10.0
"""Seconds between signs of life."""


@contextlib.contextmanager
def heartbeat(path: Path, *, stays: bool = False) -> Iterator[None]:
    """Give signs of life in `path`, from a thread; afterwards the file goes, unless it `stays`."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.is_set():
            with contextlib.suppress(OSError):  # a full disk must not end the run from here
                durable.publish_text(path, str(count := count + 1))
            stop.wait(BEAT_S)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if not stays:
            path.unlink(missing_ok=True)


def is_beating(path: Path) -> bool:
    """Whether `path` changes within 2.5 beats; its time stamp would not tell, since the clocks of two nodes differ."""
    before, deadline = _text(path), time.monotonic() + 2.5 * BEAT_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_S / 10)
        if _text(path) != before:
            return True
    return False


def is_here(process: str) -> bool:
    """Whether the process of that identity would be seen from here: the same machine, booted once, the same PID namespace.

    A host name does not tell: containers and cloned images share theirs.
    """
    return process.rpartition("/")[0] == machine_identity()


def machine_identity() -> str:
    """This machine since its boot, and this PID namespace; the host name where there is no /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def process_identity(pid: int) -> str:
    """Tells a process on this machine from a later one with its pid; empty if there is none. A zombie is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{machine_identity()}/{fields[19]}"
    except OSError:
        if Path("/proc/self").exists():
            return ""
    try:  # no /proc, as on macOS
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return f"{machine_identity()}/exists"


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""
