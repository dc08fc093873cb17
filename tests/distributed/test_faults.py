"""Stops, crashes, zombies and damage, with real processes and real signals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt2hpc.cluster import dist_env
from gpt2hpc.cluster.launch import loopback
from gpt2hpc.cluster.ledger import Cause, Ledger
from gpt2hpc.config import CheckpointConfig, RequeueConfig
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint
from tests import tiny
from tests.tiny import gpt2hpc

pytestmark = pytest.mark.alone


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a test; those that live still at its end are killed with the sessions they lead."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def cause(run: RunDir) -> Cause:
    found = Ledger(run).outcome()
    assert found is not None
    return found.cause


def test_the_newest_damaged_the_one_before_goes_on(shared_data: Manifest, run: RunDir) -> None:
    settings = tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=1, options=["--kill", "8", "0"]) == 137
    damaged = tiny.newest(run)
    assert damaged.step == 6
    file = next(damaged.path.glob("state-*"))
    file.write_bytes(file.read_bytes()[:-100])
    logged = max(tiny.losses(run))
    done = gpt2hpc("train", "--run-dir", run.path)
    assert done.returncode == 0, done.stderr
    assert f"skipping the damaged checkpoint {damaged.path}" in done.stdout
    assert "resuming at step 3 from" in done.stdout
    assert tiny.newest(run).step == 12
    assert len(tiny.losses(run)) == 12
    assert [attempt.repeats for attempt in Ledger(run).attempts()] == [0, logged - 3]
    assert logged > 3


def test_a_non_finite_loss_ends_the_run(shared_data: Manifest, run: RunDir) -> None:
    """No poisoned checkpoint is ever written, and the last good one stays."""
    settings = tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=2, options=["--nan", "6"]) == 0
    assert cause(run) is Cause.DIVERGED
    assert tiny.newest(run).step == 3
    assert not run.finished.exists()


def test_the_scalers_skips_are_no_divergence(shared_data: Manifest, run: RunDir) -> None:
    settings = tiny.config(shared_data.where, precision="fp16")
    assert tiny.run_ranks(run, settings, nproc=1, options=["--loss-scale", str(2.0**30)]) == 0
    assert cause(run) is Cause.FINISHED
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert any(facts.get("grad_norm", 0.0) is None for facts in steps), "no overflow, so the test would show nothing"


def test_a_stop_file_stops(shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]) -> None:
    settings = tiny.config(shared_data.where, total_steps=2000)
    children.append(_start("train", run, *tiny.flags(settings)))
    until(lambda: run.log.exists() and "3 train" in run.log.read_text(), "step 3")
    run.stop.touch()
    assert children[0].wait(timeout=60) == 6
    assert cause(run) is Cause.STOPPED
    assert tiny.newest(run).step > 3


def test_a_new_start_overrides_an_old_wish(shared_data: Manifest, run: RunDir) -> None:
    settings = tiny.config(shared_data.where)
    run.create()
    run.stop.touch()
    assert tiny.run_ranks(run, settings, nproc=1, restart=1) == 0, "a restart of the job obeys it"
    assert cause(run) is Cause.STOPPED
    assert gpt2hpc("train", "--run-dir", run.path).returncode == 0
    assert run.finished.exists()


def test_a_stop_leaves_validation_to_the_next_attempt(shared_data: Manifest, run: RunDir) -> None:
    """A preemption leaves seconds: they go to the save."""
    settings = tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=2, options=["--signal", "5", "1"]) == 0
    assert tiny.newest(run).step == 6
    assert list(tiny.losses(run, "val")) == [0]
    assert tiny.run_ranks(run, settings, nproc=2, restart=1) == 0
    assert list(tiny.losses(run, "val")) == [0, 6, 12]
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["val_s"] > 0 for row in rows if "val_loss" in row] == [True] * 3, "the next attempt's clock is not told"


def test_a_signal_during_start_up_is_obeyed(
    shared_data: Manifest, run: RunDir, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """Importing torch takes seconds; a TERM in them must not look like a crash."""
    settings = tiny.config(shared_data.where, total_steps=100_000)
    alone = {"RANK": "0", "WORLD_SIZE": "1", dist_env.RENDEZVOUS: str(tmp_path / "store")}
    children.append(_start("train", run, *tiny.flags(settings), env=alone))
    until(lambda: _catches(children[0].pid, signal.SIGTERM), "the handler")
    assert not Ledger(run).attempts(), "too late to show anything"
    children[0].terminate()
    output, _ = children[0].communicate(timeout=60)
    assert children[0].returncode == 0, output
    assert cause(run) is Cause.PREEMPTED
    assert tiny.newest(run).step <= 3


def test_time_runs_out(shared_data: Manifest, run: RunDir) -> None:
    """Without any signal the run stops in time, and a supervisor starts it again."""
    settings = dataclasses.replace(
        tiny.config(shared_data.where, total_steps=5),
        checkpoint=CheckpointConfig(
            stop_margin_s=59.5
        ),  # of 60 s, so that each attempt agrees to stop in its first step
    )
    done = gpt2hpc("submit", "--run-dir", run.path, "--time", "1", *tiny.flags(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [attempt.cause for attempt in Ledger(run).attempts()] == ["time_limit", "time_limit", "finished"]
    assert [attempt.saved_step for attempt in Ledger(run).attempts()] == [2, 4, 5]
    assert list(tiny.losses(run)) == [1, 2, 3, 4, 5]


def test_a_crash_is_restarted_by_the_supervisor(
    shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]
) -> None:
    settings = tiny.config(shared_data.where, total_steps=150)
    children.append(_start("submit", run, "--nproc", "2", *tiny.flags(settings)))
    until(lambda: run.log.exists() and "20 train" in run.log.read_text(), "step 20")
    os.kill(Ledger(run).attempts()[-1].pid, signal.SIGKILL)
    output, _ = children[0].communicate(timeout=120)
    assert children[0].returncode == 0, output
    assert "restarts in 0 s: crash 1 of 3 allowed (exit code 137)" in output
    assert [attempt.cause for attempt in Ledger(run).attempts()] == ["crashed", "finished"]
    assert list(tiny.losses(run)) == list(range(1, 151))


def test_the_crash_budget_ends_it(shared_data: Manifest, run: RunDir) -> None:
    """Dying at the same place each time stops after the budget, with the reason."""
    settings = dataclasses.replace(tiny.config(shared_data.where), requeue=RequeueConfig(crash_budget=1, backoff_s=0.0))
    program = (
        "import sys; from gpt2hpc import submit, train; from gpt2hpc.cluster.launch import LocalJob\n"
        "genuine = train.describe\n"
        "def describe(run, config, **more):\n"
        "    job = genuine(run, config, **more)\n"
        f"    command = (sys.executable, {str(tiny.RANK_PROGRAM)!r}, str(run.path), '--kill', '2', '0')\n"
        "    return LocalJob(command, run, job.nproc, job.job)\n"
        "train.describe = describe\n"
        f"sys.exit(submit.cli.run(submit.main, {['--cluster=local', '--run-dir', str(run.path), *tiny.flags(settings)]!r}))\n"
    )
    done = _python(program)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "crashed 2 times without progress" in done.stdout
    assert len(Ledger(run).attempts()) == 2
    assert "crashed" in gpt2hpc("status", run.path).stdout


def test_a_rank_that_is_killed_is_no_riddle(
    shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]
) -> None:
    settings = tiny.config(shared_data.where, total_steps=100_000)
    children.append(_start("train", run, *tiny.flags(settings)))
    until(lambda: run.log.exists() and "2 train" in run.log.read_text(), "step 2")
    os.kill(Ledger(run).attempts()[-1].pid, signal.SIGKILL)
    assert children[0].wait(timeout=60) == 1
    newest = Ledger(run).attempts()[-1]
    assert (newest.cause, newest.exit_code) == (Cause.CRASHED, 137)
    assert "killed by SIGKILL: out of memory?" in gpt2hpc("status", run.path).stdout


def test_a_second_start_is_refused(shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]) -> None:
    settings = tiny.config(shared_data.where, total_steps=100_000)
    children.append(_start("train", run, *tiny.flags(settings)))
    until(lambda: run.log.exists() and "2 train" in run.log.read_text(), "step 2")
    second = gpt2hpc("submit", "--run-dir", run.path)
    assert second.returncode == 9
    assert "is in use by attempt 1" in second.stderr
    assert "running" in gpt2hpc("status", run.path).stdout
    children[0].terminate()
    assert children[0].wait(timeout=60) == 6
    assert cause(run) is Cause.PREEMPTED
    assert len(Ledger(run).attempts()) == 1


def test_a_zombie_publishes_nothing(shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]) -> None:
    """Frozen, superseded by its job's restart, and thawed: it must not write, prune or log."""
    settings = tiny.config(shared_data.where)
    zombie = _start_rank(run, settings, restart=0, options=["--pause", "5", "0"])
    children.append(zombie)
    until(lambda: _state(zombie.pid) == "T", "the rank to stop itself")
    assert tiny.run_ranks(run, settings, nproc=1, restart=1) == 0
    before = _snapshot(run)
    zombie.send_signal(signal.SIGCONT)
    output, _ = zombie.communicate(timeout=60)
    assert zombie.returncode == 9, output
    assert "superseded by a newer one and writes nothing more" in output
    assert _snapshot(run) == before


def test_a_zombie_in_its_start_up_destroys_nothing(
    shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]
) -> None:
    """Frozen before it has cleared away leftovers and cut the log, while its successor is in the middle of its run."""
    settings = tiny.config(shared_data.where)
    zombie = _start_rank(run, settings, restart=0, options=["--pause-start"])
    children.append(zombie)
    until(lambda: _state(zombie.pid) == "T", "the rank to stop itself")
    successor = _start_rank(run, settings, restart=1, options=["--pause", "5", "0"])
    children.append(successor)
    until(lambda: _state(successor.pid) == "T", "the successor to stop itself")
    leftover = run.checkpoints / "being-written.tmp"
    leftover.mkdir()
    before = _snapshot(run)
    zombie.send_signal(signal.SIGCONT)
    output, _ = zombie.communicate(timeout=60)
    assert zombie.returncode == 9, output
    assert _snapshot(run) == before
    assert leftover.exists()
    successor.send_signal(signal.SIGCONT)
    successor.communicate(timeout=60)
    assert list(tiny.losses(run)) == list(range(1, 13))


def test_all_damaged_is_no_fresh_start(shared_data: Manifest, run: RunDir) -> None:
    """Starting over in silence would delete what could still be brought back."""
    settings = tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=1, options=["--kill", "8", "0"]) == 137
    log = run.log.read_bytes()
    for found in checkpoint.found(run.checkpoints):
        (found.path / "manifest.json").unlink()
    done = gpt2hpc("submit", "--run-dir", run.path)
    assert done.returncode == 9, done.stdout + done.stderr
    assert "each of the 2 checkpoints" in done.stderr
    assert run.log.read_bytes() == log


def test_a_longer_run_that_fails_is_not_finished(shared_data: Manifest, run: RunDir) -> None:
    settings = tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=1) == 0
    for verb in ("train", "submit"):
        done = gpt2hpc(verb, "--run-dir", run.path, "--steps", "30", "--train.device", "mps")
        assert done.returncode == 8, done.stdout + done.stderr
    assert re.search(r"extended +12/30 +40%", gpt2hpc("status", run.path.parent).stdout)


def test_ranks_that_cannot_meet_use_up_the_budget(shared_data: Manifest, run: RunDir) -> None:
    """They die before they can claim an attempt, so the ledger holds none of them."""
    settings = tiny.config(shared_data.where)
    nowhere = {"GLOO_SOCKET_IFNAME": "nope0"}
    done = gpt2hpc("submit", "--nproc", "2", "--run-dir", run.path, *tiny.flags(settings), env=nowhere)
    assert done.returncode == 7, done.stdout + done.stderr
    assert done.stdout.count("restarts in") == 3


def test_a_closed_terminal_does_not_cost_the_save(
    shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]
) -> None:
    """As when ssh drops: nobody reads any more, the launcher gets HUP, the ranks TERM."""
    settings = tiny.config(shared_data.where, total_steps=100_000)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by what is started here
    children.append(_start("submit", run, "--nproc", "2", *tiny.flags(settings)))
    signal.signal(signal.SIGHUP, before)
    until(lambda: run.log.exists() and "4 train" in run.log.read_text(), "step 4")
    assert children[0].stdout is not None
    children[0].stdout.close()
    children[0].send_signal(signal.SIGHUP)
    until(lambda: Ledger(run).attempts()[-1].last_step is not None, "the ranks to stop")  # what is written last
    assert cause(run) is Cause.PREEMPTED
    assert tiny.newest(run).step == Ledger(run).attempts()[-1].last_step


def test_a_signal_during_the_launch_is_not_lost(shared_data: Manifest, run: RunDir) -> None:
    """TERM while a rank is being started, before it is known or listens."""
    settings = tiny.config(shared_data.where, total_steps=100_000)
    program = (
        "import os, signal, sys, threading; from gpt2hpc import cli, submit; from gpt2hpc.cluster import launch\n"
        "genuine = launch._start\n"
        "def start(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    process = genuine(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return process\n"
        "launch._start = start\n"
        f"sys.exit(cli.run(submit.main, {['--cluster=local', '--run-dir', str(run.path), *tiny.flags(settings)]!r}))\n"
    )
    done = _python(program)
    assert done.returncode == 6, done.stdout + done.stderr
    assert "told to end by a signal" in done.stdout
    assert cause(run) is Cause.PREEMPTED


def test_a_disk_full_for_one_rank_is_told_by_all(shared_data: Manifest, run: RunDir) -> None:
    settings = tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=2, options=["--full", "1"]) == 9
    assert cause(run) is Cause.ERROR
    found = Ledger(run).outcome()
    assert found is not None
    assert (found.exit_code, "No space left" in found.message) == (9, True)
    assert checkpoint.found(run.checkpoints) == []


def test_ctrl_c_saves_and_stops(shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]) -> None:
    settings = tiny.config(shared_data.where, total_steps=100_000)
    children.append(_start("submit", run, "--nproc", "2", *tiny.flags(settings)))
    until(lambda: run.log.exists() and "3 train" in run.log.read_text(), "step 3")
    children[0].send_signal(signal.SIGINT)
    output, _ = children[0].communicate(timeout=60)
    assert children[0].returncode == 6, output
    assert "stopping after this step and saving" in output
    assert cause(run) is Cause.STOPPED
    assert tiny.newest(run).step >= 3


def test_ranks_do_not_outlive_a_killed_launcher(
    shared_data: Manifest, run: RunDir, children: list[subprocess.Popen[str]]
) -> None:
    settings = tiny.config(shared_data.where, total_steps=100_000)
    children.append(_start("submit", run, "--nproc", "2", *tiny.flags(settings)))
    until(lambda: run.log.exists() and "3 train" in run.log.read_text(), "step 3")
    children[0].kill()
    until(lambda: Ledger(run).outcome() is not None, "the ranks to stop")
    assert cause(run) is Cause.PREEMPTED


def test_finished_is_finished(shared_data: Manifest, run: RunDir) -> None:
    settings = tiny.config(shared_data.where)
    assert gpt2hpc("train", "--run-dir", run.path, *tiny.flags(settings)).returncode == 0
    again = gpt2hpc("submit", "--run-dir", run.path)
    assert again.returncode == 0
    assert "finished at step 12 already" in again.stdout
    longer = gpt2hpc("submit", "--run-dir", run.path, "--steps", "15")
    assert longer.returncode == 0, longer.stderr
    assert "the run goes on with another train.total_steps: 15 instead of 12" in longer.stdout
    assert list(tiny.losses(run)) == list(range(1, 16))


def test_torchrun_starts_it_too(shared_data: Manifest, run: RunDir) -> None:
    """The same bytes as from our launcher, which gives each rank one thread here as well."""
    settings = tiny.config(shared_data.where)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "gpt2hpc.train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback()}
    done = subprocess.run(
        [*command, "--run-dir", str(run.path), *tiny.flags(settings)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours = RunDir(run.path.with_name("ours"))
    assert tiny.run_ranks(ours, settings, nproc=2) == 0
    assert tiny.content(tiny.newest(run)) == tiny.content(tiny.newest(ours))


def test_only_the_last_checkpoints_stay(shared_data: Manifest, run: RunDir) -> None:
    settings = dataclasses.replace(
        tiny.config(shared_data.where), checkpoint=CheckpointConfig(every_steps=1, keep_last=3)
    )
    assert tiny.run_ranks(run, settings, nproc=1) == 0
    assert [found.step for found in checkpoint.found(run.checkpoints)] == [12, 11, 10]


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal (proc(5), SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def _start(verb: str, run: RunDir, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpt2hpc", *tiny.here(verb, "--run-dir", str(run.path), *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _start_rank(run: RunDir, settings: tiny.Config, *, restart: int, options: list[str]) -> subprocess.Popen[str]:
    """A rank by itself, as srun would start it."""
    run.create()
    tiny.config_io.store(tiny.starting.check_start(run, settings, world_size=1)[0], run.config)
    environment = {**os.environ, dist_env.JOB: "tiny", dist_env.RESTART: str(restart), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tiny.RANK_PROGRAM), str(run.path), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _python(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _snapshot(run: RunDir) -> dict[str, bytes]:
    """Every file of the run but the heartbeats."""
    paths = (path for path in run.path.rglob("*") if path.is_file() and path.suffix != ".beat")
    return {str(path): path.read_bytes() for path in paths}
