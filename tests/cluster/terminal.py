"""A command on a terminal of its own, whose keys a person may press."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CTRL_C = b"\x03"


@dataclass
class Terminal:
    """What is seen on it, as it comes."""

    process: subprocess.Popen[bytes]
    _keyboard: int
    _seen: list[bytes] = field(default_factory=list)

    @property
    def seen(self) -> str:
        return b"".join(self._seen).decode(errors="replace")

    def until(self, text: str, *, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text} was not seen:\n{self.seen}"
            time.sleep(0.2)

    def press(self, key: bytes) -> int:
        """The exit code of the command that this ends."""
        os.write(self._keyboard, key)
        return self.process.wait(timeout=60)

    def read(self) -> None:
        with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
            while text := os.read(self._keyboard, 1 << 16):
                self._seen.append(text)


@contextlib.contextmanager
def terminal(*arguments: str, env: Mapping[str, str], cwd: Path) -> Iterator[Terminal]:
    """`gpt2hpc …` there; it is killed at the end if it lives still."""
    keyboard, screen = pty.openpty()
    command = ["setsid", "--ctty", "--wait", sys.executable, "-m", "gpt2hpc", *arguments]
    environment = {**env, "TERM": "xterm-256color", "COLUMNS": "110", "LINES": "40"}
    process = subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen, env=environment, cwd=cwd)
    os.close(screen)
    shown = Terminal(process, keyboard)
    reader = threading.Thread(target=shown.read, daemon=True)
    reader.start()
    try:
        yield shown
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(timeout=10)
        os.close(keyboard)
