"""Who starts the ranks of a local run: found while it lives, here or elsewhere, and no longer."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from gpt2hpc import durable, submit, train_job
from gpt2hpc.cluster import foreground, liveness, requeue
from gpt2hpc.cluster.batch import BatchJob
from gpt2hpc.cluster.foreground import Supervisor
from gpt2hpc.cluster.launch import LocalJob
from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.config import Config
from gpt2hpc.errors import RunDirError
from gpt2hpc.run_dir import RunDir

ELSEWHERE = Supervisor("local-n2-1", "n2", 1, "another-boot/pid:[1]/123", 2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(liveness, "BEAT_S", 0.4)
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def announce(run: RunDir, supervisor: Supervisor) -> None:
    durable.publish_json(run.supervisor, dataclasses.asdict(supervisor))


def here(run: RunDir, name: str) -> LocalJob:
    return LocalJob(("true",), run, 1, name)


def test_one_that_was_killed_elsewhere_is_no_obstacle(run: RunDir) -> None:
    """Its last sign of life is young, and may be of a clock that is ahead."""
    announce(run, ELSEWHERE)
    beat = run.supervisor.with_suffix(".beat")
    beat.write_text("7")
    os.utime(beat, (time.time() + 3600, time.time() + 3600))
    foreground.refuse_another(run, "9")


def test_one_that_lives_elsewhere_is(run: RunDir) -> None:
    announce(run, ELSEWHERE)
    with liveness.heartbeat(run.supervisor.with_suffix(".beat")), pytest.raises(RunDirError, match="pid 1 on n2"):
        foreground.refuse_another(run, "9")


def test_one_that_lives_here_is_and_one_that_does_not_is_not(run: RunDir) -> None:
    with foreground.announced(here(run, "local-a")):
        assert foreground.find(run) is not None
        with pytest.raises(RunDirError, match="in use by job local-a"):
            foreground.refuse_another(run, "9")
    assert foreground.find(run) is None
    assert not [path for path in run.attempts.iterdir() if path.stem == run.supervisor.stem]
    announce(run, Supervisor("local-b", socket.gethostname(), 1, f"{liveness.machine_identity()}/0", 1))
    foreground.refuse_another(run, "9")


def test_no_batch_job_comes_between_two_attempts_of_one(run: RunDir) -> None:
    """Nor would another one on this machine; between them no rank lives that could be asked."""
    batch_job = BatchJob(run, "mine", 1, 1, 0, None, 60, {}, Site(), None, "")
    with foreground.announced(here(run, "local-a")):
        with pytest.raises(RunDirError, match="in use by job local-a"):
            train_job.submit(batch_job, Config(), quiet=True)
        with pytest.raises(RunDirError, match="in use by job local-a"):
            requeue.main(["may-start", str(run.path), "--job", "9"])
        told = submit._refusal(run, Config(), [], world_size=1)
    assert told is not None
    assert told.startswith("job local-a works on it, pid ")
    assert requeue.main(["may-start", str(run.path), "--job", "9"]) == 0
    assert not run.config.exists()


@pytest.mark.parametrize("loser", ["the first", "the second"])
def test_of_two_that_start_at_once_the_one_that_stays_is_found(
    loser: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = foreground.announced(here(run, "local-a")), foreground.announced(here(run, "local-b"))
    with subprocess.Popen(["sleep", "600"]) as process, monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: process.pid)
        first.__enter__()
        patched.undo()
        second.__enter__()
        gone, name = (first, "local-b") if loser == "the first" else (second, "local-a")
        gone.__exit__(None, None, None)
        found = foreground.find(run)
        process.kill()
    assert found is not None
    assert found.job == name
    assert run.supervisor.with_suffix(".beat").exists()
    (second if gone is first else first).__exit__(None, None, None)
    assert foreground.find(run) is None
    assert not run.supervisor.exists()
