"""What waits to go to the Hub, by the files of a run directory; and what goes there when another comes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gpt2hpc.config import CheckpointConfig
from gpt2hpc.errors import ConfigError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, hub_checkpoints, uploads
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.hub_checkpoints import Wanted
from tests.fake_checkpoints import write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def mark(run: RunDir, found: Checkpoint, *, seconds: float) -> None:
    sha256 = found.manifest()["sha256"]
    uploads.mark(run, found, repo="me/model", commit="c0ffee", manifest_sha256=sha256, seconds=seconds)


def steps(run: RunDir, repo: str = "me/model") -> list[int]:
    return [found.step for found in uploads.waiting(run, repo)]


def test_what_is_complete_and_not_marked_waits_the_furthest_first(run: RunDir) -> None:
    made = {step: write_checkpoint(run, step) for step in (3, 12, 6)}
    (made[3].path / checkpoint.MANIFEST).unlink()
    assert steps(run) == [12, 6]
    mark(run, made[12], seconds=1.5)
    assert steps(run) == [6]
    assert steps(run, "me/other") == [12, 6], "another repository has nothing yet"
    assert uploads.lag(run, "me/model") == uploads.Lag("me/model", 1, 12, 0, None)


def test_another_checkpoint_by_the_same_name_waits_again(run: RunDir) -> None:
    mark(run, write_checkpoint(run, 3), seconds=1)
    assert steps(run) == []
    write_checkpoint(run, 3, seed=1)
    assert steps(run) == [3]


def test_a_checkpoint_that_is_gone_no_longer_waits(run: RunDir) -> None:
    """And its mark goes with the next one's."""
    old = write_checkpoint(run, 3)
    mark(run, old, seconds=1)
    write_checkpoint(run, 6)
    checkpoint.prune(run.checkpoints, saved_step=9, config=CheckpointConfig(keep_last=1), keep=())
    assert steps(run) == [6]
    assert uploads.lag(run, "me/model").behind == 3
    mark(run, checkpoint.found(run.checkpoints)[0], seconds=1)
    assert [path.name for path in run.uploads.iterdir()] == [f"{checkpoint.found(run.checkpoints)[0].path.name}.json"]


def test_a_lease_holds_while_it_is_touched(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "TOUCH_S", 0.02)
    found = write_checkpoint(run, 3)
    assert uploads.leased(run) == set()
    with uploads.lease(run, found):
        (path,) = run.uploads.glob("*.lease")
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < time.time() - 60:
            assert time.monotonic() < deadline, "nobody touches the lease"
            time.sleep(0.01)
        assert uploads.leased(run) == {found.path}
    assert uploads.leased(run) == set()
    assert list(run.uploads.iterdir()) == []


def test_a_dead_process_holds_no_lease_for_long(run: RunDir) -> None:
    found = write_checkpoint(run, 3)
    run.uploads.mkdir()
    stale = run.uploads / "node-1-abcd.lease"
    stale.write_text(found.path.name)
    assert uploads.leased(run) == {found.path}
    os.utime(stale, (time.time() - 121,) * 2)
    assert uploads.leased(run) == set()


def test_damaged_records_are_as_none(run: RunDir) -> None:
    found = write_checkpoint(run, 3)
    mark(run, found, seconds=1)
    uploads.fail(run, "no network")
    assert uploads.failure(run) is not None
    for path in run.uploads.iterdir():
        path.write_text(json.dumps(["other"]))
    assert (uploads.failure(run), steps(run)) == (None, [3])
    assert uploads.lag(run, "me/model") == uploads.Lag("me/model", 1, None, None, None)


@pytest.mark.parametrize(
    ("lag", "line"),
    [
        (uploads.Lag("u/m", 0, None, None, None), ""),
        (uploads.Lag("u/m", 0, 300, None, None), "all on u/m"),
        (uploads.Lag("u/m", 1, None, None, "no network"), "1 to upload to u/m, nothing there yet: no network"),
        (uploads.Lag("u/m", 2, 300, 60, None), "2 to upload to u/m, step 300 is there, 60 steps behind"),
        (uploads.Lag("u/m", 2, 300, 0, None), "2 to upload to u/m, step 300 is there"),
    ],
)
def test_the_lag_is_a_line(lag: uploads.Lag, line: str) -> None:
    assert lag.line == line


@pytest.mark.parametrize(
    ("where", "wanted"),
    [("hf://user/name", Wanted("user/name")), ("hf://user/name@12000", Wanted("user/name", 12000))],
)
def test_a_place_on_the_hub(where: str, wanted: Wanted) -> None:
    assert hub_checkpoints.parse(where) == wanted


@pytest.mark.parametrize("where", ["user/name", "hf://name", "hf://user/name@", "hf://user/name@last", "hf://a/b/c"])
def test_other_words_are_no_place(where: str) -> None:
    with pytest.raises(ConfigError, match="write hf://USER/NAME, or hf://USER/NAME@STEP"):
        hub_checkpoints.parse(where)


def test_one_run_does_not_discard_anothers() -> None:
    def name(step: int, started: str = "20260131-120000", tag: str = "gpt2-124m-ctx1024") -> str:
        return checkpoint.name(started=started, tag=tag, step=step)

    others = [name(1, started="20260201-120000"), name(1, tag="gpt2-350m-ctx1024")]
    there = [*others, *(name(step) for step in (100, 200, 300, 400))]
    config = CheckpointConfig(keep_last=2, keep_every_steps=200)
    assert hub_checkpoints.discarded(there, by=name(500), config=config) == [name(100), name(300)]
    assert hub_checkpoints.discarded(there, by=name(50), config=config) == [name(100)], "never the one that comes"
