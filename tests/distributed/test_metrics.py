"""metrics.jsonl and what copies it, through a kill and a resume; and that none of it changes a byte of the training."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import writers
from tests import tiny
from tests.distributed.test_bad_input import refused
from tests.tiny import gpt2hpc


def require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{name} is not installed: make install-dev")


@pytest.fixture(scope="module")
def undisturbed(shared_data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Without any writer."""
    run = RunDir(tmp_path_factory.mktemp("undisturbed") / "run")
    assert tiny.run_ranks(run, tiny.config(shared_data.where), nproc=2) == 0
    return run


@pytest.fixture(scope="module")
def resumed(shared_data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """With every writer that is installed; killed, and steps 7 to 9 done twice."""
    run = RunDir(tmp_path_factory.mktemp("resumed") / "run")
    project = "tiny" if importlib.util.find_spec("wandb") else None
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    settings = tiny.config(shared_data.where, tensorboard=tensorboard, wandb=project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        _kill_and_resume(run, settings)
    return run


def _kill_and_resume(run: RunDir, settings: Config) -> None:
    assert tiny.run_ranks(run, settings, nproc=2, options=["--kill", "10", "0"]) == 137
    assert [facts["step"] for facts in lines(run, "loss")] == list(range(1, 10))
    (tiny.newest(run).path / "manifest.json").unlink()  # so that it goes on from step 6, behind what is logged
    assert tiny.newest(run).step == 6
    assert tiny.run_ranks(run, settings, nproc=2, restart=1) == 0


def lines(run: RunDir, key: str) -> list[dict[str, Any]]:
    return [facts for line in run.metrics.read_text().splitlines() if key in (facts := json.loads(line))]


def test_each_step_once_with_all_keys(undisturbed: RunDir) -> None:
    steps = lines(undisturbed, "loss")
    assert [facts["step"] for facts in steps] == list(range(1, 13))
    for facts in steps:
        assert {"step", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "data_wait_ms", "memory_gib", "unix_s"} == set(
            facts
        )
        assert 0 <= facts["data_wait_ms"] < facts["ms"]
        assert 0.05 < facts["memory_gib"] < 4


def test_the_training_is_the_same_with_writers(undisturbed: RunDir, resumed: RunDir) -> None:
    require("tensorboard")
    require("wandb")
    assert tiny.content(tiny.newest(resumed)) == tiny.content(tiny.newest(undisturbed))
    assert lines(resumed, "loss")[-1].keys() == lines(undisturbed, "loss")[-1].keys()


def test_tensorboard_has_each_step_once(undisturbed: RunDir, resumed: RunDir) -> None:
    require("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = EventAccumulator(str(resumed.tensorboard), size_guidance={"scalars": 0})
    told.Reload()
    for tag, key in (("train/loss", "loss"), ("val/loss", "val_loss"), ("train/memory_gib", "memory_gib")):
        written = [(facts["step"], _single(facts[key])) for facts in lines(resumed, key)]
        assert [(event.step, event.value) for event in told.Scalars(tag)] == written
    assert [(event.step, event.value) for event in told.Scalars("train/loss")] == [
        (facts["step"], facts["loss"]) for facts in lines(undisturbed, "loss")
    ]


def test_who_looks_on_forgets_what_was_done_twice(tmp_path: Path) -> None:
    """A reader that has read a file before it was emptied, as a TensorBoard that is left open."""
    require("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = tmp_path / "metrics.jsonl"
    history.write_text('{"step": 1, "loss": 3.0}\n')
    events = tmp_path / "tensorboard"
    first = writers.TensorBoard(events, history)
    first.add({"step": 2, "loss": 2.0})
    looking_on = EventAccumulator(str(events))
    looking_on.Reload()
    assert [event.step for event in looking_on.Scalars("train/loss")] == [1, 2]
    second = writers.TensorBoard(events, history)
    assert sorted(path.stat().st_size > 0 for path in events.iterdir()) == [False, True]
    second.add({"step": 2, "loss": 1.5})
    looking_on.Reload()
    assert [(event.step, event.value) for event in looking_on.Scalars("train/loss")] == [(1, 3.0), (2, 1.5)]
    third = writers.TensorBoard(events, history)
    assert len(list(events.iterdir())) == 2, "they pile up"
    looking_on.Reload()
    assert [(event.step, event.value) for event in looking_on.Scalars("train/loss")] == [(1, 3.0)]
    for writer in (first, second, third):
        writer.end()


def test_a_writer_that_fails_warns_once_and_ends_nothing(tmp_path: Path) -> None:
    class Full:
        def add(self, facts: writers.Facts) -> None:
            raise OSError(28, "No space left on device")

        end = wait = lambda self: pytest.fail("it is not called again")

    said: list[str] = []
    writer = writers.Careful("TensorBoard", Full, said.append)
    for step in (1, 2):
        writer.add({"step": step, "loss": 1.0})
    writer.end()
    writer.wait()
    assert len(said) == 1
    assert said[0].startswith("warning: TensorBoard gets no more values")
    assert "No space left" in said[0]


def test_a_directory_that_cannot_be_written_ends_nothing(shared_data: Manifest, tmp_path: Path) -> None:
    require("tensorboard")
    run = RunDir(tmp_path / "run")
    run.create()
    run.tensorboard.write_text("a file")
    done = gpt2hpc("train", "--run-dir", run.path, *tiny.flags(tiny.config(shared_data.where, tensorboard=True)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: TensorBoard gets no more values") == 1
    assert len(lines(run, "loss")) == 12


def test_wandb_offline_has_each_step_once(undisturbed: RunDir, resumed: RunDir) -> None:
    """Each attempt on its own has them all, under the run's one id."""
    require("wandb")
    files = _wandb_files(resumed)
    assert len(files) == 2
    for key, tag in (("loss", "train/loss"), ("val_loss", "val/loss")):
        told = [(row["_step"], row[tag]) for row in _wandb_rows(files[-1]) if tag in row]
        assert told == [(facts["step"], facts[key]) for facts in lines(undisturbed, key)]


def test_wandb_without_a_key_stays_on_disk(undisturbed: RunDir, tmp_path: Path) -> None:
    require("wandb")
    run = tiny.copy_run(undisturbed, tmp_path / "run")
    names = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-m", "gpt2hpc.training.wandb_follower", str(run.path), "tiny"]
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=names | home, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: W&B is not reached, so this attempt is kept in") == 1
    assert len([row for row in _wandb_rows(*_wandb_files(run)) if "train/loss" in row]) == 12


@pytest.mark.parametrize(("name", "value"), [("tensorboard", "true"), ("wandb", "mine")])
def test_what_is_not_installed_is_said_before_the_start(
    name: str, value: str, shared_data: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{name!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    settings = [*tiny.flags(tiny.config(shared_data.where)), f"--train.{name}={value}"]
    done = gpt2hpc("train", "--run-dir", tmp_path / "run", *settings, env={"PYTHONPATH": path})
    refused(done, 8, f"needs {name}", f"pip install 'gpt2hpc[{name}]'")
    assert not (tmp_path / "run").exists()


def _wandb_files(run: RunDir) -> list[Path]:
    return sorted(run.wandb.glob(f"offline-run-*/run-{run.identity.read_text().strip()}.wandb"))


def _wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The values logged in a .wandb file: LevelDB's log format (blocks of 32 KiB, records in parts) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    contents, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(contents):
        if 32768 - at % 32768 < 7:  # the rest of a block, too small for a header
            at += 32768 - at % 32768
            continue
        _, length, part = struct.unpack_from("<IHB", contents, at)
        record += contents[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            told = Record.FromString(record)
            record = b""
            if told.HasField("history"):
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in told.history.item}


def _single(value: float) -> float:
    """As TensorBoard keeps it."""
    single: float = struct.unpack("f", struct.pack("f", value))[0]
    return single
