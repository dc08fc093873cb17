"""Images of curves, drawn by the real matplotlib."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2hpc import plot
from gpt2hpc.errors import DataError, UsageError
from tests import written_runs
from tests.tiny import gpt2hpc
from tests.unit.test_curves import BUILD_NANOGPT

MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}


@pytest.fixture
def seed_log(tmp_path: Path) -> Path:
    path = tmp_path / "seed" / "log.txt"
    path.parent.mkdir()
    path.write_text(BUILD_NANOGPT)
    return path


def words(svg: Path) -> set[str]:
    """The texts in an image; matplotlib names each in a comment beside its glyphs."""
    return {text.strip() for text in re.findall(r"<!--(.*?)-->", svg.read_text())}


def curve_points(svg: Path) -> list[int]:
    """How many points each drawn curve has: paths that are clipped to the axes and no grid line."""
    paths = re.findall(
        r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none[^"]*stroke-linecap: square"', svg.read_text()
    )
    return [len(re.findall("[ML]", path)) for path in paths if "stroke: #d8dbe0" not in path]


@pytest.mark.parametrize("suffix", plot.FORMATS)
def test_each_format(suffix: str, seed_log: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / f"curves.{suffix}"
    done = gpt2hpc("plot", seed_log, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(MAGIC[suffix])
    assert done.stdout == f"{out}: 3 train, 2 val, 2 hella points of 1 log\n"
    assert done.stderr == f"gpt2hpc: warning: {seed_log}: lines left out: 1 blank, 2 of another form, 1 not finite\n"


def test_several_runs_with_smoothing_and_logarithms(seed_log: Path, tmp_path: Path) -> None:
    run = written_runs.write(tmp_path / "_mine$x$", [])
    out = tmp_path / "curves.svg"
    options = ["--x-scale", "log", "--y-scale", "log", "--smooth", "5", "--title", "50$ and $more"]
    assert plot.main([str(seed_log), str(run.path), "--out", str(out), *options]) == 0
    assert {
        "seed, training loss, mean of 5",
        "_mine$x$, training loss, mean of 5",
        "_mine$x$, validation loss",
        "seed, HellaSwag acc_norm",
        "50$ and $more",
        "GPT-2 124M",
        "GPT-3 XL",
        "step",
    } <= words(out)
    again = tmp_path / "again.svg"
    assert plot.main([str(seed_log), str(run.path), "--out", str(again), *options]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_every_value_is_drawn(tmp_path: Path) -> None:
    run = written_runs.write(tmp_path / "run", [], steps=60)
    out = tmp_path / "curves.svg"
    assert plot.main([str(run.path), "--out", str(out), "--kinds", "val"]) == 0
    assert 4 in curve_points(out)  # steps 0, 20, 40 and 60
    assert "training loss" not in words(out)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--out", "x.jpg"], UsageError, r"--out=x.jpg has no known suffix; end it in .png, .svg, .pdf"),
        (["--out", "x.png", "--smooth", "0"], UsageError, r"--smooth=0 must be 1 or more"),
        (["--out", "x.png", "--kinds", "train,vla"], UsageError, r"vla is unknown; the kinds are train, val, hella"),
        (["--out", "x.png", "--kinds", ","], UsageError, r"--kinds is empty"),
        (["absent", "--out", "x.png"], DataError, r"absent is not there"),
    ],
)
def test_errors(options: list[str], error: type[Exception], message: str, seed_log: Path) -> None:
    with pytest.raises(error, match=message):
        plot.main([str(seed_log), *options])
    assert not Path("x.png").exists()


def test_no_such_values(tmp_path: Path) -> None:
    run = written_runs.write(tmp_path / "run", [], steps=1)
    with pytest.raises(DataError, match=r"--kinds=hella: no such values in .*metrics.jsonl"):
        plot.main([str(run.path), "--out", str(tmp_path / "x.png"), "--kinds", "hella"])
    assert not (tmp_path / "x.png").exists()


def test_where_matplotlib_is_not_installed(seed_log: Path, tmp_path: Path) -> None:
    """As it is after a plain `pip install gpt2hpc`."""
    blocked = "import sys; sys.modules['matplotlib'] = None; from gpt2hpc.__main__ import console; sys.exit(console())"
    out = tmp_path / "x.png"
    command = [sys.executable, "-c", blocked, "plot", str(seed_log), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 8
    assert done.stderr == (
        "gpt2hpc: error: matplotlib is not installed, and this command needs it: pip install 'gpt2hpc[plot]'\n"
    )
    assert not out.exists()
