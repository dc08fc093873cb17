from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).parent / "large_state.py"
PARAMETERS = 1_557_611_200 + 47 * 1600
"""Of GPT-2 1558M, with the rows of padding."""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    free = shutil.disk_usage(tmp_path).free
    if free < 8e9 and not os.environ.get("CI"):
        pytest.skip(f"needs 8 GB of disk in {tmp_path}, which has {free / 1e9:.1f}")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def ranks(count: int, *words: str | Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(PROGRAM), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_state_of_1558m_is_written_by_all_ranks_at_once_and_read_by_another_number(directory: Path) -> None:
    written = ranks(4, "write", directory)
    assert max(each["began"] for each in written) < min(each["ended"] for each in written), "not at the same time"
    sizes = [each["bytes"] for each in written]
    assert max(sizes) < 1.01 * min(sizes), "not in even shares"
    read = ranks(3, "read", directory)
    assert sum(each["tensors"] for each in read) == 3 * (12 * 48 + 4)
    assert sum(each["elements"] for each in read) == 3 * PARAMETERS
