"""An image in use, as a user has it: unprivileged, read-only, without network, with none of the caller's environment."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.container import machine

TIMEOUT_S = 300


@dataclass(frozen=True)
class Image:
    """`apptainer VERB IMAGE …`, with flags in VERB perhaps, in `home`, after `prefix`, which takes the network away."""

    apptainer: Path
    file: Path
    prefix: tuple[str, ...]
    home: Path

    def start(self, verb: str, *arguments: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> Process:
        """The process is Apptainer itself, so that it can be signalled."""
        command = [*self.prefix, *machine.as_user(self.apptainer, *verb.split(), self.file, *arguments)]
        environment = {**machine.user_environment(), "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.Popen(
            command,
            cwd=self.home,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )

    def run(
        self, verb: str, *arguments: str | Path, env: Mapping[str, str] | None = None, text: str = ""
    ) -> tuple[int, str]:
        """Exit code and output of the command, which reads `text`."""
        return finish(self.start(verb, *arguments, env=env), text)


Process = subprocess.Popen[str]


def finish(process: Process, text: str = "") -> tuple[int, str]:
    """Exit code and output; Apptainer's own remarks are left out."""
    try:
        said, _ = process.communicate(text, timeout=TIMEOUT_S)
    finally:
        process.kill()
    lines = [line for line in said.splitlines() if not line.startswith("INFO:")]
    return process.returncode, "\n".join(lines)
