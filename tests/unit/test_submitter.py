"""A task of an array, or an evaluation, that another gpt2hpc has submitted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from gpt2hpc import __version__, pipeline, prepare_array
from gpt2hpc.cluster import submitter
from gpt2hpc.errors import MissingError

TASKS = [prepare_array.Step(("--help",)), pipeline.Verb("prepare", ("--help",))]


@pytest.fixture(autouse=True)
def _first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2HPC_SUBMITTED_VERSION", "0.0.9")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def ended(task: Callable[[], int]) -> object:
    with pytest.raises(SystemExit) as end:
        task()
    return end.value.code


def test_it_is_said_where_a_job_has_waited_for_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(TASKS[1]) == 0
    assert "gpt2hpc 0.0.9 submitted the job" in capsys.readouterr().err


def test_it_is_refused_at_its_first_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(TASKS[0]) == MissingError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert f"gpt2hpc 0.0.9 submitted the job, but its ranks run gpt2hpc {__version__}; install 0.0.9" in said.err


@pytest.mark.parametrize("task", TASKS)
def test_it_goes_on_where_it_is_the_same_or_newer_by_a_restart(
    task: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value, warned in (("SLURM_RESTART_COUNT", "1", True), ("GPT2HPC_SUBMITTED_VERSION", __version__, False)):
        monkeypatch.setenv(name, value)
        assert ended(task) == 0
        said = capsys.readouterr()
        assert "usage: gpt2hpc prepare" in said.out
        assert ("gpt2hpc 0.0.9 submitted the job" in said.err) is warned


class Sleeper:
    """A task whose verb sees to no signal."""

    def __call__(self) -> int:
        def sleeps(words: Sequence[str]) -> int:
            print("ready", flush=True)
            time.sleep(60)
            return 0

        return submitter.run_task(sleeps, ())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=["SIGTERM", "SIGUSR2"])
def test_a_signal_ends_what_submitit_runs(number: signal.Signals, tmp_path: Path) -> None:
    """At once: of a preemption's grace nothing is to be waited for, and the batch script decides what comes then."""
    DelayedSubmission(Sleeper()).dump(tmp_path / "7_submitted.pkl")
    job = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "GPT2HPC_SUBMITTED_VERSION": __version__}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "submitit.core._submit", str(tmp_path)],
        env={**os.environ, **job},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        assert process.stdout is not None
        until_ready = next((line for line in process.stdout if line == "ready\n"), None)
        assert until_ready is not None
        process.send_signal(number)
        assert process.wait(timeout=20) == -number
