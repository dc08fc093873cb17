"""When a run will be finished, and how many jobs that takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gpt2hpc.reporting import outlook
from gpt2hpc.reporting.outlook import Outlook


@pytest.mark.parametrize(
    ("left_s", "limit_s", "expected"),
    [
        (math.inf, None, Outlook(1000, 0)),  # runs, and has no limit
        (1100, 1200, Outlook(1000, 0)),  # it ends with the save at its end
        (1059, 1200, Outlook(1000 + 100, 1)),  # one second too few
        (None, None, Outlook(1000 + 100, 1)),
        (None, 1160, Outlook(1000 + 100, 1)),  # 1160 = 1000 of work, 100 of start, 60 before the end
        (None, 1159, Outlook(1000 + 200, 2)),
        (560, 410, Outlook(1000 + 200, 2)),  # 500 now, then twice 250
        (None, 160, None),  # no time for a step
    ],
)
def test_jobs_and_time(left_s: float | None, limit_s: float | None, expected: Outlook | None) -> None:
    told = outlook.outlook(1000, 1.0, left_s=left_s, limit_s=limit_s, start_up_s=100, margin_s=60)
    assert told == expected


def test_nothing_is_left() -> None:
    assert outlook.outlook(0, 1.0, left_s=None, limit_s=100, start_up_s=1, margin_s=1) == Outlook(0, 0)


def _log(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 99, "lo')
    return path


def _step(step: int, at: float, loss: float = 3.0) -> dict[str, object]:
    return {"step": step, "loss": loss, "ms": 1000.0, "tokens_per_s": 2000.0 + step, "unix_s": at}


def test_rates_leave_out_restarts_and_hold_saves(tmp_path: Path) -> None:
    """Steps of a second; a validation of 4 s; a restart at 1010 whose first step ends at 1031."""
    records = [
        _step(1, 1001),
        _step(2, 1002),
        {"step": 2, "val_loss": 3.5, "unix_s": 1006.0},
        _step(3, 1007),
        _step(4, 1031),
        _step(5, 1032),
    ]
    logged = outlook.read(_log(tmp_path / "metrics.jsonl", *records))
    assert (logged.step, logged.loss, logged.val_loss, logged.mfu) == (5, 3.0, 3.5, None)
    assert logged.tokens_per_s == 2003.0
    assert logged.step_s([1010.0]) == pytest.approx((1 + 5 + 1) / 3)
    assert logged.started_up_s(1010.0, 3, 1.0) == pytest.approx(20.0)
    assert logged.started_up_s(1033.0, 5, 1.0) is None


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert outlook.read(tmp_path / "none") == outlook.Logged()
