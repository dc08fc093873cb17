from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).parent / "kill_during_save.py"


def test_a_kill_during_a_save_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"20 kills, (\d+) of them during a save", done.stdout)
    assert match
    assert int(match[1]) >= 5, "too few kills hit a save to show anything"
