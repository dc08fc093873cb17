"""A save that is killed, or refused by the disk, at each of its file operations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).parent / "save_faults.py"


def struck(folder: Path, mode: str, *, every: int = 1) -> list[dict[str, Any]]:
    """What came of each operation; the program itself checks that a whole checkpoint is there after each."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), mode, str(every)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    assert not results[-1]["struck"]
    assert len(results) > 30 / every, "too few operations to be all of them"
    assert {each["step"] for each in results} == {2, 3}
    return results[:-1]


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert {each["code"] for each in struck(tmp_path, "kill")} == {137}


@pytest.mark.parametrize(("mode", "every"), [("ENOSPC", 1), ("EDQUOT", 5), ("EROFS", 5), ("EACCES", 5)])
def test_a_disk_that_refuses_any_operation_says_what_to_do(mode: str, every: int, tmp_path: Path) -> None:
    for each in struck(tmp_path, mode, every=every):
        if each["code"] == 0:  # clearing away may fail in silence: it is done again
            assert each["step"] == 3
            continue
        assert each["code"] == 9, each
        assert "could not be written" in each["said"]
        assert ("free space" if mode != "EACCES" else "choose a place that you may use") in each["said"]


def test_another_error_is_a_crash_that_may_pass(tmp_path: Path) -> None:
    codes = {each["code"] for each in struck(tmp_path, "EIO", every=5)}
    assert codes <= {0, 1}
    assert 1 in codes
