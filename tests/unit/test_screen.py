"""What is shown where: on a terminal, in a pipe, in a Slurm step, to somebody who wants quiet."""

from __future__ import annotations

import io
import math
import os
import pty
import select
import sys
from collections.abc import Iterator

import pytest

from gpt2hpc import cli
from gpt2hpc.training.metrics import StepRecord
from gpt2hpc.training.screen import Curve, LiveView, Quiet, Screen, Silent, chosen

ON_TERMINAL = {"TERM": "xterm-256color"}


class Terminal:
    """A pseudo terminal in the place of standard output; not a fixture, since pytest sets that anew for each test's call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reader, follower = pty.openpty()
        self._file = os.fdopen(follower, "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", self._file)
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", ON_TERMINAL["TERM"])

    def until(self, word: str) -> str:
        """What was printed since the last time, up to a word that must come; a terminal passes things on in pieces."""
        self._file.flush()
        read = ""
        while not read.endswith(word):
            assert select.select([self._reader], [], [], 10.0)[0], f"no {word!r} in {read!r}"
            read += os.read(self._reader, 1).decode("latin-1")
        return read.encode("latin-1").decode()

    def hang_up(self) -> None:
        os.close(self._reader)


@pytest.fixture
def not_quiet() -> Iterator[None]:
    yield
    cli._quiet = False


def record(step: int, loss: float = 5.0) -> StepRecord:
    return StepRecord(step, loss, 1e-3, 1.0, 250.0, 100.0, 0.41, 0.1, 0.5)


def test_the_screen_suits_where_the_output_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    Terminal(monkeypatch)
    assert isinstance(chosen({}, is_first=False), Silent)
    live = chosen(ON_TERMINAL, is_first=True)
    assert isinstance(live, LiveView)
    live.close()
    for environ in ({**ON_TERMINAL, "SLURM_STEP_ID": "0"}, {"TERM": "dumb"}, {}):
        assert type(chosen(environ, is_first=True)) is Screen
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert type(chosen(ON_TERMINAL, is_first=True)) is Screen


def test_the_view_says_where_the_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    view = LiveView()
    view.show(record(10), 100)
    shown = terminal.until("for data 0.1")
    for word in ("step 10/100", "10.0%", "ETA 0:22", "loss 5.0000", "100 tok/s", "mfu 41.0%"):
        assert word in shown
    view.show(record(11), 100)
    view.say("saved")
    above = terminal.until("saved")
    assert "▁" in above, "the curve, from before"
    assert "step 11/100" not in above + terminal.until("step 10/100"), "drawn too soon after the last time"
    view.show(record(100), 100)
    terminal.until("step 100/100")
    view.close()
    view.say("finished")
    view.say("the end")
    assert terminal.until("the end").endswith("finished\r\nthe end")


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    for colors in (True, False):
        if not colors:
            monkeypatch.setenv("NO_COLOR", "1")
        view = LiveView()
        view.show(record(1), 100)
        view.close()
        view.say("closed")
        shown = terminal.until("closed")
        assert "loss 5.0000" in shown
        assert ("\x1b[36m" in shown) == colors
        assert ("32mloss" in shown) == colors


def test_a_closed_terminal_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    view = LiveView()
    view.show(record(1), 100)
    terminal.hang_up()
    view.show(record(100), 100)
    view.show(record(100), 100)
    view.say("finished")
    view.close()


def test_quiet_means_warnings_and_the_end(capsys: pytest.CaptureFixture[str], not_quiet: None) -> None:
    cli.be_quiet()
    screen = chosen({}, is_first=True)
    assert isinstance(screen, Quiet)
    screen.show(record(1), 2)
    screen.say("saved step 1")
    screen.say("warning: something")
    screen.say("skipping the damaged checkpoint")
    cli.note("a detail")
    cli.say("finished")
    assert capsys.readouterr().out.splitlines() == [
        "warning: something",
        "skipping the damaged checkpoint",
        "finished",
    ]


@pytest.mark.parametrize("count", [1, 60, 61, 119, 120, 121, 5000])
def test_the_curve_falls_and_fits(count: int) -> None:
    curve = Curve(60)
    for number in range(count):
        curve.add(10.0 - number / count)
        curve.add(math.nan)
    bars = str(curve)
    assert min(count, 30) <= len(bars) <= 60
    assert list(bars) == sorted(bars, reverse=True)
    if count > 1:
        assert (bars[0], bars[-1]) == ("█", "▁")


def test_an_empty_curve_is_empty() -> None:
    assert str(Curve(60)) == ""
