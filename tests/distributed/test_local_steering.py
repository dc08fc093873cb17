"""A local run, watched and steered from another terminal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.tiny import gpt2hpc

pytestmark = pytest.mark.alone

STEPS = 20_000
"""More than anybody waits for."""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "mine")


@contextlib.contextmanager
def in_a_terminal(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on in the foreground, as in another terminal."""
    command = [sys.executable, "-m", "gpt2hpc", *tiny.here(*words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def status(run: RunDir) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(gpt2hpc("status", run.path, "--json").stdout)[0]
    return shown


def test_cancelled_resumed_and_stopped(shared_data: Manifest, run: RunDir) -> None:
    flags = tiny.flags(tiny.config(shared_data.where, total_steps=STEPS))
    with in_a_terminal("submit", "--run-dir", str(run.path), "--nproc", "2", *flags) as supervisor:
        until(lambda: run.log.exists() and "\n9 train" in run.log.read_text(), "step 9")
        running = status(run)
        assert (running["state"], running["jobs_needed"], running["next"]) == ("running", 0, None)
        assert running["eta_s"] > 0
        done = gpt2hpc("resume", cwd=run.path.parents[1])
        assert (done.returncode, "runs/mine runs already: job local-" in done.stdout) == (0, True), (
            done.stdout + done.stderr
        )
        assert f"TERM was sent to pid {supervisor.pid}" in gpt2hpc("cancel", run.path).stdout
        assert supervisor.wait(timeout=60) == 6
    ended = status(run)
    assert (ended["state"], ended["next"]) == ("cancelled", f"gpt2hpc resume {run.path}")
    assert "has no job in the queue: cancelled" in gpt2hpc("cancel", run.path).stdout
    with in_a_terminal("resume", str(run.path)) as supervisor:
        until(
            lambda: len(Ledger(run).attempts()) == 2 and Ledger(run).attempts()[1].first_step,
            "the second attempt's first step",
        )
        assert "is asked to save and end" in gpt2hpc("stop", "--no-wait", run.path).stdout
        told = gpt2hpc("stop", run.path).stdout
        assert "stopped, step" in told or "does not run: stopped" in told
        assert supervisor.wait(timeout=60) == 6
    first, second = Ledger(run).attempts()
    assert (second.first_step, second.world_size, second.cause) == (first.saved_step, 2, "stopped")
    assert status(run)["state"] == "stopped"
    assert not run.stop.exists() or "does not run: stopped" in gpt2hpc("stop", run.path).stdout
    followed = gpt2hpc("logs", "-f", run.path)
    assert (followed.returncode, "mine: stopped, stopped by the user at step" in followed.stderr) == (0, True), (
        followed.stderr
    )
    refused = gpt2hpc("resume", run.path, "--", "--time=5")
    assert (refused.returncode, "options of sbatch" in refused.stderr) == (2, True)


def crash(run: RunDir, attempt: int) -> None:
    """Of a rank, so that the next attempt is a pause away."""
    until(lambda: [each.saved_step for each in Ledger(run).attempts()[attempt:]] > [0], "a checkpoint")
    os.kill(Ledger(run).attempts()[attempt].pid, signal.SIGKILL)
    until(lambda: (decision := Ledger(run).decision()) and decision.action == "requeue", "the pause")


def test_cancelled_and_stopped_between_two_attempts(shared_data: Manifest, run: RunDir) -> None:
    settings = tiny.flags(tiny.config(shared_data.where, total_steps=STEPS))
    flags = [*settings, "--checkpoint.every_steps", "5", "--requeue.backoff_s", "600"]
    with in_a_terminal("submit", "--run-dir", str(run.path), "--nproc", "1", *flags) as supervisor:
        crash(run, 0)
        pausing = status(run)
        assert (pausing["state"], "starts again: crash 1 of" in pausing["detail"]) == ("starting", True), pausing
        assert "runs already" in gpt2hpc("resume", run.path).stdout
        second = gpt2hpc("submit", "--cluster", "local", "--run-dir", run.path)
        assert (second.returncode, f"pid {supervisor.pid}" in second.stderr) == (9, True), second.stderr
        assert f"TERM was sent to pid {supervisor.pid}" in gpt2hpc("cancel", run.path).stdout
        assert supervisor.wait(timeout=60) == 6
    assert status(run)["state"] == "cancelled"
    with in_a_terminal("resume", str(run.path)) as supervisor:
        crash(run, 1)
        told = gpt2hpc("stop", run.path).stdout
        assert ("is asked to save and end" in told, ": stopped, step" in told) == (True, True), told
        assert supervisor.wait(timeout=60) == 6
    assert status(run)["state"] == "stopped"
    assert len(Ledger(run).attempts()) == 2
    assert not run.stop.exists()


def test_stopped_before_the_first_attempt_has_begun(shared_data: Manifest, run: RunDir) -> None:
    flags = tiny.flags(tiny.config(shared_data.where, total_steps=STEPS))
    run.create()
    run.stop.touch()  # of an earlier time
    with in_a_terminal("submit", "--run-dir", str(run.path), "--nproc", "1", *flags) as supervisor:
        until(run.supervisor.exists, "a supervisor")
        assert not run.stop.exists()
        assert "is asked to save and end" in gpt2hpc("stop", "--no-wait", run.path).stdout
        assert supervisor.wait(timeout=120) == 6
    assert status(run)["state"] == "stopped"


def test_a_run_of_which_nobody_knows_how_it_was_submitted(shared_data: Manifest, run: RunDir) -> None:
    assert tiny.run_ranks(run, tiny.config(shared_data.where), nproc=1, job="12") == 0
    run.finished.unlink()
    refused = gpt2hpc("resume", run.path)
    assert refused.returncode == 9
    assert "submit it by the same command again" in refused.stderr
