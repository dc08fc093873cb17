"""The benchmarks that need a GPU, rehearsed on the CPU: each goes its way, and all trainers compute the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.overhead import BOUNDS
from bench.profile import Span, union
from bench.train import OTHERS, OURS


@pytest.mark.timeout(1200)
def test_all_that_a_gpu_would_measure(tmp_path: Path) -> None:
    words = ["-m", "bench.gpu", "--device", "cpu", "--name", str(tmp_path / "gpu")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert facts["missing"] == {}
    [run] = facts["parts"]["train"]["runs"]
    ours = run["contenders"][OURS]["losses"]
    assert len(ours) == facts["parts"]["train"]["steps"]
    assert ours[-1] < ours[0]
    for other in OTHERS:
        assert run["contenders"][other]["losses"] == pytest.approx(ours, abs=1e-4)
    assert set(facts["parts"]["overhead"]["shares"]) == set(BOUNDS)
    assert all(share >= 0 for share in facts["parts"]["overhead"]["shares"].values())
    for row in facts["parts"]["memory"]["rows"]:
        assert row["bytes"] == pytest.approx(row["foretold"], rel=0.06)
    assert [row["differ"] for row in facts["parts"]["exact"]["rows"]] == [[]]
    profiled = facts["parts"]["profile"]
    calls = {row["name"]: row["calls"] for row in profiled["operators"]}
    assert calls["aten::gelu"] == calls["aten::gelu_backward"] == 4, "two layers, two micro batches"
    assert 0 < sum(row["ms"] for row in profiled["operators"]) <= profiled["profiled_ms"]
    for table in (
        "## Memory (memory)",
        "## Training steps (train)",
        "## Beside the steps (overhead)",
        "## Going on exactly (exact)",
        "## A step's time (profile)",
    ):
        assert table in (tmp_path / "gpu.md").read_text()


def test_how_long_a_gpu_is_busy() -> None:
    """Kernels of several streams run at once, and one may lie within another."""
    spans = [Span("a", 10, 20), Span("b", 50, 90), Span("c", 15, 30), Span("d", 60, 70)]
    assert union(spans) == 20 + 40
    assert union([]) == 0


def test_a_part_of_it_again_leaves_the_others(tmp_path: Path) -> None:
    """What is not done keeps its older table, and says so; what was not done before stays named."""
    old = {"table": "## Old\n", "rows": []}
    (tmp_path / "gpu.json").write_text(
        json.dumps({"parts": {"train": old, "memory": old}, "missing": {"overhead": "not in 1 s"}})
    )
    words = ["-m", "bench.gpu", "--device", "cpu", "--name", str(tmp_path / "gpu"), "--parts"]
    done = subprocess.run([sys.executable, *words, "memory"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert facts["parts"]["train"] == old
    assert facts["parts"]["memory"]["rows"]
    assert facts["missing"] == {"overhead": "not in 1 s"}
    again = [*words, "train", "--seconds", "0"]
    done = subprocess.run([sys.executable, *again], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "- Not done: train (no time was left; its table is older)." in text
    assert "- Not done: overhead (not in 1 s)." in text
    assert "## Old" in text
    assert "## Memory" in text
    (tmp_path / "gpu.json").write_text("{}")
    done = subprocess.run([sys.executable, *again], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is of another benchmark" in done.stderr.splitlines()[-1]
    assert (tmp_path / "gpu.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench.gpu"], "no GPU answers"),
        (["bench.train", "--steps", "3"], "--steps=3 must be a multiple of 2"),
        (["bench.train", "--contenders", "gpt2hpc, CUDA graphs"], "only that can be replayed"),
        (
            ["bench.gpu", "--device", "cpu", "--parts", "starts"],
            "the parts are train, overhead, memory, profile, exact",
        ),
        (["bench.train", "--micro-batches", "0"], "--micro-batches=0 must be 1 or more"),
        (["bench.startup", "--device", "cuda"], "no GPU answers"),
        (["bench.profile", "--device", "cuda"], "no GPU answers"),
        (["bench.profile", "--top", "0"], "--top=0 must be 1 or more"),
        (["bench.profile", "--contender", "gpt2hpc, CUDA graphs"], "only that can be replayed"),
        (["bench.overhead", "--steps", "3"], "--steps=3 must be 8 or more"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(words: list[str], told: str) -> None:
    if "GPU" in told and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert done.stdout == ""
