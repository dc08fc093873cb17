"""A training as a terminal sees it, and as a pipe does."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.tiny import gpt2hpc


def on_terminal(*arguments: str) -> str:
    """What a command prints there, both streams."""
    reader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "SLURM_STEP_ID")}
    environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpt2hpc", *tiny.here(*arguments)]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    seen = b""
    try:
        while read := os.read(reader, 1 << 16):
            seen += read
    except OSError:  # Linux's way to say that nobody writes any more
        pass
    os.close(reader)
    assert process.wait(timeout=60) == 0, seen.decode()
    return seen.decode()


def test_live_on_a_terminal_lines_in_a_pipe_and_the_same_bytes(shared_data: Manifest, tmp_path: Path) -> None:
    flags = tiny.flags(tiny.config(shared_data.where))
    live, piped = RunDir(tmp_path / "live"), RunDir(tmp_path / "piped")
    seen = on_terminal("submit", "--run-dir", str(live.path), "--nproc", "2", *flags)
    assert "\x1b[1A\x1b[2K" in seen, "nothing was drawn over"
    assert "ETA" in seen
    assert "step 12/12" in seen
    assert seen.index("starting at step 0") < seen.index("ETA") < seen.index(f"finished at step 12: {live.path}")
    assert seen.rstrip().splitlines()[-1].startswith("job local-"), "the supervisor's last word, on a line of its own"
    done = gpt2hpc("submit", "--run-dir", piped.path, "--nproc", "2", *flags, env={"TERM": "xterm-256color"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("step") and " loss " in line]) == 12 + 3
    assert tiny.content(tiny.newest(live)) == tiny.content(tiny.newest(piped))
    quiet = gpt2hpc("train", "--run-dir", piped.path, "--nproc", "2", "--steps", "13", "--quiet")
    warned, ended = quiet.stdout.splitlines()
    assert warned.startswith("warning: 13 steps instead of 12 change the learning rate of step 13 from ")
    assert ended == f"finished at step 13: {piped.path}"
