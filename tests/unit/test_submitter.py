"""A task of an array, or an evaluation, that another gpt2hpc has submitted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpt2hpc import __version__, pipeline, prepare_array
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
