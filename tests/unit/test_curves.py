"""Logs of ours and of others as curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gpt2hpc.errors import DataError
from gpt2hpc.reporting import charts, curves
from tests import written_runs

BUILD_NANOGPT = """\
0 val 10.9503
0 hella 0.2463
0 train 10.955029

# second attempt, on other nodes
1 train 10.651424
2 train 10.295
2 train 10.287
250 val 5.9
250 hella 0.2513
3 train nan
4 tr"""


def parsed(text: str) -> curves.Curves:
    return curves.parse(text, name="x", path=Path("x"))


def test_the_text_of_build_nanogpt() -> None:
    found = parsed(BUILD_NANOGPT)
    assert found.series == {
        "train": ((0, 10.955029), (1, 10.651424), (2, 10.287)),  # of a step that stands twice the last
        "val": ((0, 10.9503), (250, 5.9)),
        "hella": ((0, 0.2463), (250, 0.2513)),
    }
    assert (found.blank, found.skipped, found.nonfinite) == (1, 2, 1)
    assert found.remarks == "x: lines left out: 1 blank, 2 of another form, 1 not finite"


def test_our_log_has_no_remarks() -> None:
    found = parsed("0 val 10.5\n1 train 10.4\n1 save 0.25\n")
    assert set(found.series) == {"val", "train"}
    assert found.remarks == ""


def test_metrics() -> None:
    lines = [
        {"step": 0, "val_loss": 10.5, "val_tokens": 4096},
        {"step": 0, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.26},
        {"step": 1, "loss": 10.4, "lr": 1e-4, "grad_norm": None, "ms": 5.0, "tokens_per_s": 100, "mfu": 0.4},
        {"step": 1, "save_s": 0.3},
    ]
    found = parsed("".join(json.dumps(line) + "\n" for line in lines))
    assert found.series == {
        "val": ((0, 10.5),),
        "hella": ((0, 0.26),),
        "hella_acc": ((0, 0.25),),
        "train": ((1, 10.4),),
        "lr": ((1, 1e-4),),
        "tokens_per_s": ((1, 100.0),),
        "mfu": ((1, 0.4),),
    }
    assert (found.blank, found.skipped, found.nonfinite) == (0, 0, 1)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "loss": 1',
        '{"loss": 1.0}',
        '{"step": "1", "loss": 1.0}',
        '{"step": true, "loss": 1.0}',
        '{"step": 1, "loss": "low"}',
        '{"step": 1, "loss": [1]}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "-1 train 3.0",
        "1.5 train 3.0",
        "1 train",
        "1 train 3.0 4.0",
        "1 trains 3.0",
        "\x00\x00\x00",
        "9" * 5000 + " train 3.0",
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
    ],
    ids=lambda line: line[:24],
)
def test_damaged_lines_are_skipped(line: str) -> None:
    found = parsed(f"1 train 3.0\n{line}\n2 train 2.9")
    assert found.series == {"train": ((1, 3.0), (2, 2.9))}
    assert found.skipped == 1


def test_a_run_a_file_and_what_is_none_of_them(tmp_path: Path) -> None:
    run = written_runs.write(tmp_path / "mine", [], steps=20)
    assert curves.read(run.path) == curves.read(run.metrics)
    assert curves.read(run.path).name == curves.read(run.metrics).name == "mine"
    run.log.write_text("0 val 9.5\n")
    assert curves.read(run.log).of("val") == ((0, 9.5),)
    run.metrics.unlink()
    assert curves.read(run.path).of("val") == ((0, 9.5),)
    other = tmp_path / "seed.txt"
    other.write_bytes(b"0 val 9.5\n\xff\xfe\n")
    assert (curves.read(other).name, curves.read(other).skipped) == ("seed", 1)
    for absent in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError, match=r"is not there; give a run directory"):
            curves.read(absent)
    other.write_text("one two three\n")
    with pytest.raises(DataError, match="holds no line such as"):
        curves.read(other)


def test_names_that_are_the_same_become_paths(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "run" for folder in "ab"] + [tmp_path / "other"]
    for path in paths:
        written_runs.write(path, [], steps=1)
    assert [found.name for found in curves.read_all(paths)] == [str(paths[0]), str(paths[1]), "other"]


def test_smoothed() -> None:
    series = [(step, float(step)) for step in range(1, 6)]
    assert curves.smoothed(series, 1) == series
    assert curves.smoothed(series, 2) == [(1, 1.0), (2, 1.5), (3, 2.5), (4, 3.5), (5, 4.5)]
    assert curves.smoothed(series, 100)[-1] == (5, 3.0)


def test_thinning_keeps_the_ends_and_every_spike() -> None:
    series = [(step, math.sin(step)) for step in range(50_000)]
    series[33_333] = (33_333, 99.0)
    series[44_444] = (44_444, -99.0)
    thin = charts.thinned(series)
    assert 1000 < len(thin) <= charts.MAX_POINTS + 2
    assert {series[0], series[33_333], series[44_444], series[-1]} <= set(thin)
    assert list(thin) == sorted(thin)
    assert charts.thinned(series[: charts.MAX_POINTS]) == series[: charts.MAX_POINTS]


def test_a_smooth_curve_is_made_of_all_values() -> None:
    series = [(step, float(step % 7)) for step in range(10_000)]
    width, means = charts.means(series)
    assert (width, len(means)) == (7, 1429)
    assert {value for _, value in means[:-1]} == {3.0}
    assert means[0][0] == 6
    assert charts.means(series[:100]) == (1, series[:100])
