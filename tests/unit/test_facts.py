"""What a report says of attempts, lost work and cost."""

from __future__ import annotations

import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpt2hpc.cluster.ledger import Attempt
from gpt2hpc.config import Config, TrainConfig
from gpt2hpc.errors import DataError
from gpt2hpc.reporting import facts
from gpt2hpc.reporting.facts import RunFacts
from tests import written_runs
from tests.fake_checkpoints import write_checkpoint
from tests.tiny import gpt2hpc
from tests.written_runs import attempt

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def read(path: Path, *attempts: Attempt, **values: float) -> RunFacts:
    return facts.read(written_runs.write(path, attempts, **values).path, now=NOON)


def test_lost_work_is_what_a_later_attempt_computed_again(tmp_path: Path) -> None:
    run = read(
        tmp_path / "run",
        attempt(1, saved_step=60, last_step=60, cause="preempted"),
        attempt(2, first_step=60, saved_step=100, cause="crashed", exit_code=137, repeats=0),
        attempt(3, first_step=100, saved_step=150, last_step=155, cause="diverged", repeats=35),
        attempt(4, first_step=150, saved_step=200, last_step=200, cause="finished", repeats=5),
    )
    assert [(start.resumed, start.reached, start.repeated) for start in run.starts] == [
        (0, 60, 0),
        (60, 135, 35),
        (100, 155, 5),
        (150, 200, 0),
    ]
    assert (run.repeated, run.unknown_ends, run.step) == (40, 0, 200)
    assert [(each.number, each.step, each.cause) for each in run.restarts] == [
        (2, 60, "preempted"),
        (3, 100, "crashed"),
        (4, 150, "diverged"),
    ]


def test_what_nobody_wrote_is_not_known(tmp_path: Path) -> None:
    """An end without a word, and a following attempt that did not say what it repeats (of an earlier version)."""
    run = read(tmp_path / "run", attempt(1, saved_step=60), attempt(2, first_step=60, saved_step=90))
    assert [start.repeated for start in run.starts] == [None, 0]
    assert (run.repeated, run.unknown_ends) == (0, 1)
    assert run.restarts[0].cause == "ended without a word"
    assert gpt2hpc("report", run.run.path).returncode == 0
    assert "At least 0 steps of 200 were computed again" in run.run.report.read_text()


def test_a_start_that_did_not_get_to_its_checkpoint_loses_nothing(tmp_path: Path) -> None:
    run = read(
        tmp_path / "run",
        attempt(1, saved_step=60, last_step=60, cause="preempted"),
        attempt(2, cause="crashed"),
        attempt(3, first_step=60, saved_step=200, last_step=200, cause="finished", repeats=0),
    )
    assert [(start.resumed, start.repeated) for start in run.starts] == [(0, 0), (60, 0), (60, 0)]
    assert [each.step for each in run.restarts] == [60, 60]


def test_cost_counts_every_rank_from_start_to_end(tmp_path: Path) -> None:
    run = read(tmp_path / "run", attempt(1), attempt(2, world_size=4), mfu=0.4)
    assert [start.seconds for start in run.starts] == [1800.0, 1800.0]
    assert (run.rank_hours, run.hour_unit) == (6.0, "GPU-hours")


@pytest.mark.parametrize(
    ("device", "unit"), [("cpu", "process-hours (CPU)"), ("auto", "process-hours"), ("cuda", "GPU-hours")]
)
def test_a_cpus_hours_are_no_gpus(tmp_path: Path, device: str, unit: str) -> None:
    config = Config(train=TrainConfig(device=device))  # type: ignore[arg-type]
    assert facts.read(written_runs.write(tmp_path / "run", [], config=config).path).hour_unit == unit


def test_an_end_that_is_not_written_is_assumed_and_said(tmp_path: Path) -> None:
    written = written_runs.write(
        tmp_path / "run", [attempt(1, ended=None), attempt(2, ended=None), attempt(3, ended=None)]
    )
    beat = written.attempts / "0002.beat"
    beat.touch()
    at = datetime(2026, 1, 31, 2, 10, tzinfo=UTC).timestamp()
    os.utime(beat, (at, at))
    run = facts.read(written.path, now=NOON)
    assert [(start.seconds, start.assumed) for start in run.starts] == [
        (3600.0, "the next start"),
        (600.0, "its last sign of life"),
        (None, "no end is known"),
    ]


def test_nodes_versions_and_samples(tmp_path: Path) -> None:
    written = written_runs.write(tmp_path / "run", [attempt(1), attempt(2, nodes="gpu02")])
    written.samples.mkdir()
    for step in range(0, 2000, 100):
        (written.samples / f"step{step}.txt").write_text("x" * 5000)
    write_checkpoint(written, 100)
    run = facts.read(written.path)
    assert run.nodes == Counter(gpu01=1, gpu02=2)
    names = [name for name, _ in run.samples]
    assert (names[0], names[-1], len(names), run.sample_files) == ("step0", "step1900", facts.SAMPLES_SHOWN, 20)
    assert names == sorted(names, key=lambda name: int(name.removeprefix("step")))
    assert len(run.samples[0][1]) == facts.SAMPLE_CHARACTERS + 2
    assert run.versions == {}  # a manifest that does not tell them


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        facts.read(tmp_path)


def test_a_run_that_has_logged_nothing_is_told_all_the_same(tmp_path: Path) -> None:
    run = written_runs.write(tmp_path / "run", [attempt(1, cause="crashed", exit_code=1)])
    run.metrics.unlink()
    run.config.write_text("train: [damaged\n")
    done = gpt2hpc("report", run.path)
    assert (done.returncode, done.stderr) == (0, "")
    text = run.report.read_text()
    assert "Nothing is logged yet." in text
    assert "crashed, exit code 1" in text
    assert "train: [damaged" in text


def test_a_directory_whose_name_is_no_text(tmp_path: Path) -> None:
    run = written_runs.write(tmp_path / os.fsdecode(b"l\xe4uft"), [attempt(1)])
    done = gpt2hpc("report", run.path, "--out", tmp_path / "report.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "l?uft" in (tmp_path / "report.html").read_text()


def test_report_of_no_directory(tmp_path: Path) -> None:
    done = gpt2hpc("report", tmp_path / "absent")
    assert done.returncode == 9
    assert "is not a directory; give a run directory" in done.stderr


def test_a_report_compares_settings_and_says_what_it_left_out(tmp_path: Path) -> None:
    runs = [
        written_runs.write(
            tmp_path / name, [attempt(1)], config=Config(train=TrainConfig(seed=seed)), hellaswag_acc_norm=0.3
        )
        for name, seed in (("one", 1), ("two", 2))
    ]
    with runs[1].metrics.open("a") as file:
        file.write("torn\n")
    out = tmp_path / "new" / "both.html"
    done = gpt2hpc("report", *(run.path for run in runs), "--out", out)
    assert done.returncode == 0, done.stderr
    assert "1 of another form" in done.stderr
    text = out.read_text()
    assert "1 of another form" in text
    assert "<td>train.seed</td><td>1</td><td>2</td>" in text
    assert "<td>train.device</td>" not in text
    assert text.count('<tr class="own">') == 2
    assert "table H.1" in text
