"""Whose lines are in which log."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path

import pytest

from gpt2hpc import durable, logs
from gpt2hpc.cluster.ledger import Attempt, Decision, Ledger
from gpt2hpc.reporting import job_logs
from gpt2hpc.run_dir import RunDir
from tests.tiny import gpt2hpc

LOG = """set-up of the first
0: attempt 1: job 12, restart 0, on n[1-2]
0: step 1
1: warning: of rank 1
gpt2hpc: job 12: requeue: preempted at step 1
slurmstepd: error: *** JOB 12 ON n1 CANCELLED ***
0: attempt 2: job 12, restart 1, on n[1-2]
0: step 2
0: attempt 3: job 12, restart 2, on n[1-2]
0: step 3
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Job 12 of a template was preempted, then lost its node; job 14 of `submit` has a log for each rank; then a local job."""
    run = RunDir(tmp_path / "mine")
    run.create()
    run.slurm.mkdir()
    for number, (job, restart) in enumerate([("12", 0), ("12", 1), ("12", 2), ("14", 0), ("local-x", 0)], start=1):
        attempt = Attempt(number, job, restart, "n1", 1, "", "", "n[1-2]", 2)
        durable.publish_json(run.attempt(number), dataclasses.asdict(attempt))
    (tmp_path / "somewhere.log").write_text(LOG)
    run.job_logs.write_text(f"12 {tmp_path}/somewhere.log\n12 {tmp_path}/somewhere.log\n14 {run.slurm}/14_0_log.out\n")
    (run.slurm / "14_0_log.out").write_text("attempt 4: job 14, restart 0, on n1\nstep 4\n")
    (run.slurm / "14_1_log.out").write_text("submitit INFO (2026) - Starting\nTraceback of rank 1\n")
    run.rank_logs.mkdir()
    run.rank_log("local-x", 0, 1).write_text("of the local rank 1\n")
    return run


def test_all_of_them_in_order(run: RunDir) -> None:
    found = job_logs.found(run)
    assert [(log.job, log.rank) for log in found] == [("12", None), ("14", 0), ("14", 1), ("local-x", 1)]
    assert job_logs.lines(found[2]) == ["Traceback of rank 1"]


@pytest.mark.parametrize(
    ("number", "first", "last"),
    [
        (1, "set-up of the first", "gpt2hpc: job 12: requeue: preempted at step 1"),
        (2, "slurmstepd: error: *** JOB 12 ON n1 CANCELLED ***", "0: step 2"),
        (3, "0: attempt 3: job 12, restart 2, on n[1-2]", "0: step 3"),
    ],
)
def test_one_log_of_three_attempts(run: RunDir, number: int, first: str, last: str) -> None:
    attempts, log = Ledger(run).attempts(), job_logs.found(run)[0]
    lines = job_logs.of_attempt(log, attempts[number - 1], attempts)
    assert (lines[0], lines[-1]) == (first, last)


def test_the_command(run: RunDir, tmp_path: Path) -> None:
    told = gpt2hpc("logs", run.path, "--rank", "1").stdout
    assert told == (
        f"==> {tmp_path}/somewhere.log <==\nwarning: of rank 1\n\n==> {run.slurm}/14_1_log.out <==\nTraceback of rank 1\n"
        f"\n==> {run.rank_log('local-x', 0, 1)} <==\nof the local rank 1\n"
    )
    assert gpt2hpc("logs", run.path, "--attempt", "4", "-n", "2").stdout.splitlines()[-1] == "Traceback of rank 1"
    assert gpt2hpc("logs", run.path, "--attempt", "2", "--rank", "0").stdout.splitlines()[1:] == [
        "attempt 2: job 12, restart 1, on n[1-2]",
        "step 2",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--attempt", "9"], 2, "has attempts 1 to 5"),
        (["--rank", "7"], 4, "has no lines of that rank"),
        (["-f", "--attempt", "1"], 2, "give one of the two"),
        (["-n", "-1"], 2, "--lines=-1 must be 0 or more"),
    ],
)
def test_what_cannot_be_shown(run: RunDir, arguments: list[str], code: int, said: str) -> None:
    done = gpt2hpc("logs", run.path, *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("verb", ["logs", "stop", "cancel", "resume"])
def test_no_run(verb: str, tmp_path: Path) -> None:
    absent, empty = gpt2hpc(verb, tmp_path / "absent"), gpt2hpc(verb, tmp_path)
    assert (absent.returncode, empty.returncode) == (9, 9)
    assert "is not a directory; name a run directory" in absent.stderr
    assert "is not a run directory: it has no config.yaml" in empty.stderr


def test_a_copy_is_not_taken_for_its_original(run: RunDir, tmp_path: Path) -> None:
    """What submits it again names the original, by its whole path."""
    for path in run.attempts.glob("*.json"):
        path.unlink()
    original = RunDir(tmp_path / "an original")
    run.path.rename(original.path)
    original.resume_script.write_text(f"#!/bin/bash\nexport RUN_DIR={shlex.quote(str(original.path))}\nexport DATA=x\n")
    copy = tmp_path / "a copy"
    shutil.copytree(original.path, copy)
    done = gpt2hpc("resume", copy, env={"PATH": "/nowhere"})
    assert (done.returncode, f"goes on with {original.path}, of which {copy} is a copy" in done.stderr) == (9, True), (
        done.stderr
    )
    assert f"--run-dir='{copy}'" in done.stderr
    (tmp_path / "link").symlink_to(original.path)
    done = gpt2hpc("resume", tmp_path / "link", env={"PATH": "/nowhere"})
    assert (done.returncode, "sbatch is not on PATH" in done.stderr) == (8, True), done.stderr


def test_a_log_that_is_deleted_while_it_is_followed(tmp_path: Path) -> None:
    log = job_logs.JobLog(tmp_path / "12_0_log.out", "12")
    log.path.write_text("first\nsecond\n")
    printer = logs.Printer(None)
    assert printer.take(log) == ["first", "second"]
    log.path.unlink()
    assert printer.take(log) == []
    log.path.write_text("anew\n")
    assert printer.take(log) == ["anew"]


def test_nobody_waits_for_a_job_that_was_not_submitted(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm is not seen, what was to be submitted again must at least be known by its number."""
    monkeypatch.setenv("PATH", "/nowhere")
    run.attempts.joinpath("0005.json").unlink()
    ledger = Ledger(run)
    newest = ledger.newest()
    assert newest is not None
    ledger.note(newest, cause="preempted", last_step=4)
    ledger.remember(Decision("14", 0, "resubmit", "preempted at step 4"))
    assert logs._Watch(run).look() == "silent"
    run.jobs.write_text("15\n")
    assert logs._Watch(run).look() == "goes on"
