"""Ctrl-C, TERM and HUP at the worst moment, while a process is being started: it is not left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpt2hpc import image
from gpt2hpc.checks import programs
from gpt2hpc.cluster import signals
from gpt2hpc.trials import rounds
from gpt2hpc.trials.bench import Bench

EACH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen[str]]]:
    """What is started, of which each gets this process the signal before it is known."""
    found: list[subprocess.Popen[str]] = []
    genuine, number = subprocess.Popen, request.getfixturevalue("number")

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        found.append(genuine(*arguments, **options))
        signal.raise_signal(number)
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    yield found
    for process in found:
        process.kill()
        process.wait()


@EACH
def test_they_wait(number: int) -> None:
    done = []

    def go() -> None:
        with signals.held():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("held")
        done.append("gone on")

    with pytest.raises(KeyboardInterrupt), signals.as_interrupts():
        go()
    assert done == ["held"]


def test_nothing_is_changed_where_none_comes() -> None:
    before = signal.getsignal(signal.SIGINT)
    with signals.held():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread() -> None:
    done = []

    def hold() -> None:
        with signals.held():
            done.append("held")

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert done == ["held"]


@EACH
def test_a_trial_that_is_being_started_ends(number: int, started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    [longest] = [trial for trial in rounds.TRIALS if trial.beside]
    with pytest.raises(KeyboardInterrupt), signals.as_interrupts():
        list(rounds.made(Bench("cpu", tmp_path, 0), {}, [longest]))
    [process] = started
    assert process.poll() is not None


@EACH
def test_a_build_that_is_being_started_ends(number: int, started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    out = tmp_path / "image.sif"
    program = f"import time; open({str(tmp_path / 'began')!r}, 'w').close(); time.sleep({1 if number == signal.SIGINT else 600})"
    build = SimpleNamespace(
        out=out,
        source=SimpleNamespace(path=tmp_path / "apptainer.def"),
        runtime="apptainer",
        command=lambda beside: [sys.executable, "-c", program],
        environment=dict,
    )
    with pytest.raises(KeyboardInterrupt), signals.as_interrupts():
        image._run(cast("Any", build))
    [process] = started
    assert process.poll() is not None
    assert not out.exists()


@EACH
def test_a_program_that_is_being_asked_ends(number: int, started: list[subprocess.Popen[str]]) -> None:
    with pytest.raises(KeyboardInterrupt), signals.as_interrupts():
        programs.ask(["sleep", "600"])
    [process] = started
    assert process.wait(timeout=60) == -signal.SIGKILL
