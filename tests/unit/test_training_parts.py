"""Logs, stopping and devices, without a run around them."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.signals import SignalFlag, Stop
from gpt2hpc.config import CheckpointConfig, Config
from gpt2hpc.errors import MissingError, NodeError, RunDirError
from gpt2hpc.jobs import Train
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import metrics, progress
from gpt2hpc.training.batches import to_device
from gpt2hpc.training.metrics import MetricsLog, StepRecord
from gpt2hpc.training.process_group import select_device
from gpt2hpc.training.stop import Agreement, Clock, StopFile

ALONE = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n1")


def record(step: int, **more: float) -> StepRecord:
    facts = {"loss": 5.0, "lr": 1e-3, "grad_norm": 1.0, "ms": 10.0, "tokens_per_s": 100.0, **more}
    facts = {**facts, "data_wait_ms": 0.5, "memory_gib": 0.25}
    return StepRecord(step=step, mfu=None, **facts)


def opened(run: RunDir, resumed_step: int) -> MetricsLog:
    return MetricsLog(run, resumed_step=resumed_step, fence=lambda: None, say=lambda text: None)


def test_logs_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = opened(run, 0)
    log.validation(0, 10.8, 100, seconds=1.0)
    for step in (1, 2, 3, 4):
        log.step(record(step, loss=float(step)), 10)
    log.validation(4, 7.5, 100, seconds=1.0)
    log.close()
    with run.log.open("a") as file:
        file.write("5 trai")  # torn by a kill
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    log = opened(run, 3)
    assert log.has("val", 0)
    assert not log.has("val", 4), "it was cut, so it is due again"
    log.step(record(4, loss=4.5), 10)
    log.close()
    assert run.log.read_text().splitlines() == [
        "0 val 10.800000",
        "1 train 1.000000",
        "2 train 2.000000",
        "3 train 3.000000",
        "4 train 4.500000",
    ]
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_samples_beyond_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = opened(run, 0)
    for step in (5, 10):
        log.sample(step, "text")
    log.close()
    (run.samples / "stepping.txt").write_text("of a user")
    log = opened(run, 5)
    assert log.has("sample", 5)
    assert not log.has("sample", 10)
    log.close()
    assert {path.name for path in run.samples.iterdir()} == {"step0000005.txt", "stepping.txt"}


def test_an_older_attempts_open_log_is_not_the_runs(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    zombie = opened(run, 0)
    opened(run, 0).close()
    zombie.step(record(1), 10)
    assert run.log.read_text() == ""


def test_a_superseded_attempt_logs_nothing(tmp_path: Path) -> None:
    run, fenced = RunDir(tmp_path), False

    def fence() -> None:
        if fenced:
            raise RunDirError("superseded")

    log = MetricsLog(run, resumed_step=0, fence=fence, say=lambda text: None)
    log.step(record(1), 10)
    before = run.log.read_text(), run.metrics.read_text()
    fenced = True
    with pytest.raises(RunDirError):
        log.step(record(2), 10)
    with pytest.raises(RunDirError):
        log.validation(2, 5.0, 10, seconds=1.0)
    with pytest.raises(RunDirError):
        MetricsLog(run, resumed_step=0, fence=fence, say=lambda text: None)
    assert (run.log.read_text(), run.metrics.read_text()) == before


def test_metrics_are_json_even_of_nan(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = opened(run, 0)
    log.step(record(1, loss=float("nan"), grad_norm=float("inf")), 10)
    facts = json.loads(run.metrics.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert (facts["loss"], facts["grad_norm"], facts["lr"]) == (None, None, 1e-3)


def test_a_step_line_says_it_all() -> None:
    line = dataclasses.replace(record(12), mfu=0.41).line(100)
    for word in ("step  12/100", "loss  5.0000", "lr 1.00e-03", "norm  1.000", "10.0 ms", "100 tok/s", "mfu 41.0%"):
        assert word in line
    assert "mfu" not in record(12).line(100)


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_only_set_a_flag(number: int, handlers: None) -> None:
    flag = SignalFlag()
    flag.install()
    assert flag.stop is Stop.NO
    for _ in range(3):  # a group signal may arrive more than once
        os.kill(os.getpid(), number)
    assert flag.stop is Stop.PREEMPTED


def test_interrupt_is_the_users_and_wins(handlers: None) -> None:
    flag = SignalFlag()
    flag.install()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.stop is Stop.STOPPED


def test_the_largest_reason_wins() -> None:
    assert max(Stop.TIME_LIMIT, Stop.PREEMPTED, Stop.STOPPED, Stop.DIVERGED) is Stop.DIVERGED
    assert [stop.cause for stop in list(Stop)[1:]] == ["time_limit", "preempted", "stopped", "diverged"]
    assert Agreement().stop is Stop.NO


def test_the_clock_asks_once_a_period() -> None:
    clock = Clock(CheckpointConfig(every_minutes=0.001), job_end=None)
    assert not clock.asks_to_save()
    time.sleep(0.07)
    assert clock.asks_to_save()
    assert not clock.asks_to_save(), "asked twice before it was saved, it would be saved twice"
    clock.begins_to_save()
    assert not clock.asks_to_save()
    time.sleep(0.07)
    assert clock.asks_to_save()


def test_the_end_is_near_when_a_save_would_not_fit() -> None:
    config = CheckpointConfig(stop_margin_s=60)
    assert not Clock(config, job_end=None).is_end_near(1.0, is_saving=False)
    clock = Clock(config, job_end=time.time() + 100)
    assert not clock.is_end_near(1.0, is_saving=False)
    assert clock.is_end_near(20.0, is_saving=False), "three long steps do not fit"
    clock.took("save", 40.0)
    assert clock.is_end_near(1.0, is_saving=False), "a save as long as the last one does not fit"
    assert Clock(config, job_end=time.time() + 100, state_bytes=12 * 1_557_611_200).is_end_near(1.0, is_saving=False), (
        "nor a first one of 1.5B"
    )
    clock = Clock(config, job_end=time.time() + 100)
    clock.took("save", 15.0)
    assert not clock.is_end_near(1.0, is_saving=False)
    assert clock.is_end_near(1.0, is_saving=True), "a save that waits for another does not fit"
    clock = Clock(config, job_end=time.time() + 100)
    clock.took("val", 20.0)
    assert not clock.is_end_near(1.0, is_saving=False)
    clock.took("hella", 30.0)
    assert clock.is_end_near(1.0, is_saving=False), "nor evaluations that may be due"


def test_what_took_long_once_is_forgotten() -> None:
    """A disk that hung, a job that was suspended: without that each job to come would end after a step."""
    clock = Clock(CheckpointConfig(stop_margin_s=60), job_end=time.time() + 1000)
    for work in ("save", "val"):
        clock.took(work, 2400.0)
        for seconds in (1.0, 2.0):
            clock.took(work, seconds)
            assert clock.is_end_near(1.0, is_saving=False), "one that was shorter says little"
        clock.took(work, 1.0)
        assert not clock.is_end_near(1.0, is_saving=False)


def test_the_log_tells_the_next_attempt_what_took_how_long(tmp_path: Path) -> None:
    """Of the save, too, that an attempt ended with."""
    run = RunDir(tmp_path)
    log = opened(run, 0)
    log.validation(0, 10.8, 100, seconds=7.0)
    log.save(2, seconds=3.0, stall_s=0.1, size=10)
    log.hellaswag(4, acc=0.25, acc_norm=0.25, examples=8, seconds=9.0)
    log.save(4, seconds=4.0, stall_s=0.1, size=10)
    log.save(6, seconds=5.0, stall_s=0.1, size=10)
    log.close()
    again = opened(run, 4)
    assert list(again.took()) == [("val", 7.0), ("save", 3.0), ("hella", 9.0), ("save", 4.0)]
    again.close()
    nobody = MetricsLog(None, resumed_step=4, fence=lambda: None, say=lambda text: None)
    assert list(nobody.took()) == []


def test_steps_are_timed_whether_they_are_logged_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop before a job's end reckons with them from the second on; the first waits for the first shard, too."""
    now = 1000.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    config, ranks = Config(), SimpleNamespace(device=torch.device("cpu"), world_size=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=100))
    log = MetricsLog(None, resumed_step=0, fence=lambda: None, say=lambda text: None)
    timed = progress.Progress(config, ranks, log, step=0)  # type: ignore[arg-type]

    def step(number: int, seconds: float) -> float:
        nonlocal now
        now += seconds
        timed.add(number, torch.ones(()), torch.ones(()))
        return timed.step_s

    timed.restart_clock(0)  # a validation
    assert [step(1, 500.0), step(2, 60.0), step(3, 62.0)] == [0.0, 60.0, 61.0]
    now += 300.0
    timed.restart_clock(3)  # a save
    assert timed.step_s == 61.0
    assert step(4, 59.0) == 59.0


def test_a_stop_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    assert not StopFile(path).is_there()
    path.touch()
    found = StopFile(path)
    assert found.is_there()
    path.unlink()
    assert found.is_there()


def test_no_silent_cpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with_gpus = dataclasses.replace(ALONE, gpus_allotted=True)
    assert select_device("auto", ALONE).type == "cpu"
    assert select_device("cpu", with_gpus).type == "cpu"
    for name, env in (("auto", with_gpus), ("cuda", ALONE)):
        with pytest.raises(MissingError, match="--device cpu"):
            select_device(name, env)
    with pytest.raises(MissingError, match=r"train\.device=mps"):
        select_device("mps", ALONE)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_a_rank_takes_its_gpu(visible: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm may show each rank all GPUs of the node, or only its own."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    fourth = dataclasses.replace(ALONE, rank=7, local_rank=3, world_size=8, local_world_size=4)
    assert select_device("auto", fourth) == torch.device("cuda", index) == chosen[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MissingError, match="4 ranks on this node but 2 GPUs"):
        select_device("auto", fourth)
    with pytest.raises(NodeError, match="allotted 4 GPUs of n2, but only 2 answer there"):
        select_device("auto", dataclasses.replace(fourth, gpus_on_node=4, node="n2"))
    with pytest.raises(MissingError, match="4 ranks on this node but 2 GPUs"):
        select_device("auto", dataclasses.replace(fourth, gpus_on_node=4, gpus_shown=2, node="n2"))


@pytest.mark.parametrize(
    ("build", "said", "shown", "error"),
    [
        ("12.8", "No CUDA GPUs are available", None, NodeError),
        ("12.8", "CUDA unknown error\nlong", 4, NodeError),
        ("12.8", "No CUDA GPUs are available", 0, MissingError),
        ("12.8", "The NVIDIA driver on your system is too old (found version 11040)", None, MissingError),
        (None, "Torch not compiled with CUDA enabled", None, MissingError),
    ],
)
def test_all_gpus_of_a_node_are_gone(
    build: str | None, said: str, shown: int | None, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", build)
    rank = dataclasses.replace(ALONE, gpus_allotted=True, gpus_on_node=4, gpus_shown=shown, node="n2")
    told = "Slurm allotted 4 GPUs of n2, but none answers there: " if error is NodeError else "--device cpu"
    with pytest.raises(error, match=told):
        select_device("auto", rank)
    assert select_device("cpu", rank).type == "cpu"


@pytest.mark.parametrize(("devices", "shown"), [("0,1,2,3", 4), ("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-8932f937", 1)])
def test_gpus_that_the_user_shows(devices: str, shown: int) -> None:
    assert DistEnv.from_env({"CUDA_VISIBLE_DEVICES": devices}).gpus_shown == shown
    assert DistEnv.from_env({}).gpus_shown is None


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_looks_like_a_new_tensor(rows: int) -> None:
    """Strides too, at which torch.compile looks."""
    windows = np.arange(rows * 9, dtype=np.uint16).reshape(rows, 9)
    inputs, targets = to_device(windows, torch.device("cpu"))
    assert inputs.stride() == targets.stride() == torch.zeros(rows, 8).stride()
    assert inputs.untyped_storage().data_ptr() != targets.untyped_storage().data_ptr()
    assert (inputs.tolist(), targets.tolist()) == (windows[:, :-1].tolist(), windows[:, 1:].tolist())


def test_jobs_pickle_by_reference() -> None:
    """A few bytes that any Python version can read: no bytecode travels."""
    packed = pickle.dumps(Train("runs/x"))
    assert len(packed) < 120
    assert pickle.loads(packed) == Train("runs/x")


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("here", "came", "expected"),
    [
        (lines(), lines(1, 2, 3), lines(1, 2, 3)),  # an empty disk
        (lines(1, 2, 3, 4, 5), lines(1, 2, 3), lines(1, 2, 3, 4, 5)),  # its own checkpoint: it is cut back elsewhere
        (lines(1, 2), lines(1, 2, 3, 4), lines(1, 2, 3, 4)),  # the Hub's is further
        (lines(1).replace("0.1", "0.9"), lines(1, 2, 3), lines(1, 2, 3)),  # another timeline
        (lines(1, 2), "", lines(1, 2)),  # a file of another project came without
        (lines(1, 2), "[1]\nnonsense\n", lines(1, 2)),
    ],
)
def test_the_history_of_a_checkpoint_leaves_no_gap(here: str, came: str, expected: str, tmp_path: Path) -> None:
    run, saved = RunDir(tmp_path), tmp_path / "came.jsonl"
    run.metrics.write_text(here)
    saved.write_text(came)
    metrics.restore(run, saved, 4)
    assert run.metrics.read_text() == expected
    if expected != here:
        assert [line.split()[:2] for line in run.log.read_text().splitlines()] == [
            [str(json.loads(line)["step"]), "train"] for line in expected.splitlines()
        ]
