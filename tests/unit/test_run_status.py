"""What status makes of a ledger and of Slurm's rows, and how it is written."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc import config_io, durable
from gpt2hpc.cluster.ledger import Attempt, Decision, Ledger
from gpt2hpc.cluster.queries import Accounted, Queued
from gpt2hpc.errors import RunDirError
from gpt2hpc.reporting import run_status, runs, status_table
from gpt2hpc.reporting.run_status import Answers, RunStatus
from gpt2hpc.run_dir import RunDir
from tests import tiny

NOW = "2026-01-02T10:00:00"


def queued(number: str = "12", state: str = "RUNNING", reason: str = "None", **more: str) -> Queued:
    facts = {"start": NOW, "nodes": "n[1-2]", "left": "1:00:00", "partition": "gpu", "limit": "2:00:00", **more}
    return Queued(number, state, reason, **facts)


def answers(*rows: Queued, accounts: dict[str, Accounted] | None = None) -> Answers:
    return Answers({row.number: row for row in rows}, accounts or {}, time.time())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 12 steps whose second attempt, of job 12, ended without a word at step 8."""
    run = RunDir(tmp_path / "mine")
    run.create()
    config_io.store(tiny.config(tmp_path), run.config)
    attempt(run, 1, cause="preempted", last_step=6, suspects=("n7",))
    attempt(run, 2, restart=1, first_step=6)
    lines = [{"step": step, "loss": 5.0, "ms": 1000.0, "tokens_per_s": 256.0, "mfu": 0.4} for step in range(1, 9)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def attempt(run: RunDir, number: int, *, restart: int = 0, **facts: Any) -> None:
    made = Attempt(number, "12", restart, "n1", 1, "2026-01-02T09:00:00Z", "elsewhere/1", "n[1-2]", 4, **facts)
    durable.publish_json(run.attempt(number), dataclasses.asdict(made))


@pytest.mark.parametrize(
    ("row", "state", "detail", "next_"),
    [
        (
            queued(state="PENDING", reason="Priority"),
            "pending",
            "job 12 waits: Priority: jobs of higher priority",
            None,
        ),
        (
            queued(state="PENDING", reason="launch failed requeued held"),
            "held",
            "could not start it",
            "scontrol release 12",
        ),
        (queued(state="PENDING", reason="Unheard"), "pending", "job 12 waits: Unheard", None),
        (queued(state="SUSPENDED"), "suspended", "job 12 on n[1-2]", None),
        (queued(state="STOPPED"), "suspended", "job 12 on n[1-2]", None),
        (queued(state="SIGNALING"), "starting", "job 12 on n[1-2]", None),
        (queued(state="STAGE_OUT"), "ending", "job 12 on n[1-2]", None),
        (queued(state="REQUEUE_HOLD"), "held", "held (REQUEUE_HOLD)", "scontrol release 12"),
        (queued(state="SPECIAL_EXIT", reason="BeginTime"), "held", "held (SPECIAL_EXIT)", "scontrol release 12"),
        (
            queued(state="NODE_FAIL"),
            "crashed",
            "job 12 on n[1-2] ended: NODE_FAIL: a node of it failed; it would resume at step 6",
            "again",
        ),
        (queued(state="TIMEOUT"), "time_limit", "TIMEOUT: killed at its time limit", "again"),
        (queued(state="FAILED", reason="JobLaunchFailure"), "crashed", "its batch script was killed", "again"),
        (queued(state="OUT_OF_MEMORY"), "crashed", "ask for more (--mem)", "again"),
    ],
)
def test_states(run: RunDir, row: Queued, state: str, detail: str, next_: str | None) -> None:
    told = run_status.read_status(run, answers(row))
    assert told.state == state
    assert detail in told.detail
    expected = "the command that submitted it, again" if next_ == "again" else next_
    assert told.next == expected


def test_without_slurm_and_with_a_script_to_resume(run: RunDir) -> None:
    run.slurm.mkdir()
    run.resume_script.touch()
    told = run_status.read_status(run)
    assert (told.state, told.next) == ("crashed", f"gpt2hpc resume {run.path}")
    assert "ended without a word; it would resume at step 6" in told.detail


def test_who_cancelled_it(run: RunDir) -> None:
    account = Accounted("12", "CANCELLED", "0:15", NOW, "n[1-2]", by="0")
    told = run_status.read_status(run, answers(accounts={"12": account}))
    assert told.state == "cancelled"
    assert "CANCELLED: cancelled by root" in told.detail


@pytest.mark.parametrize(
    ("exit_code", "told"),
    [
        (137, "crashed, killed by SIGKILL: out of memory?; it"),
        (139, "crashed, killed by SIGSEGV; it"),
        (1, "crashed; it"),
    ],
)
def test_a_rank_that_was_killed(run: RunDir, exit_code: int, told: str) -> None:
    attempt(run, 2, restart=1, first_step=6, cause="crashed", exit_code=exit_code)
    assert told in run_status.read_status(run).detail


def test_a_run_at_its_end_needs_no_time(run: RunDir) -> None:
    since = "2026-01-01T00:00:00"
    before = run_status.read_status(run, answers(queued(start=since)))
    assert (before.state, before.left_s) == ("running", 3600)
    assert before.eta_s is not None
    attempt(run, 2, restart=1, first_step=6, cause="stopped", last_step=8)
    told = run_status.read_status(run, answers(queued(start=since)))
    assert (told.state, told.left_s, told.eta_s, told.jobs_needed) == ("ending", None, None, None)


def test_a_requeue_that_somebody_cancelled(run: RunDir) -> None:
    attempt(run, 2, restart=1, first_step=6, cause="preempted", last_step=8)
    Ledger(run).remember(Decision("12", 1, "requeue", "preempted at step 8"))
    assert run_status.read_status(run, answers(queued(state="PENDING", reason="BeginTime"))).state == "pending"
    told = run_status.read_status(run, answers(queued(state="CANCELLED")))
    assert (told.state, told.detail) == (
        "cancelled",
        "preempted at step 8; then job 12 on n[1-2] ended: CANCELLED: cancelled",
    )


def test_a_batch_script_that_was_killed_after_its_ranks_had_saved(run: RunDir) -> None:
    attempt(run, 2, restart=1, first_step=6, cause="preempted", last_step=8, saved_step=8)
    told = run_status.read_status(run, answers(queued(state="FAILED", reason="JobLaunchFailure")))
    assert told.state == "crashed"
    assert told.detail.startswith(
        "preempted at step 8; then job 12 on n[1-2] ended: FAILED (JobLaunchFailure): its batch script was killed"
    )


def test_a_guard_waits_behind_the_job_that_it_guards(run: RunDir) -> None:
    run.slurm.mkdir()
    run.jobs.write_text("15\n")
    run.guard.write_text("15\n")
    rows = queued(state="PENDING", reason="BeginTime"), queued("15", "PENDING", "Dependency")
    assert run_status.read_status(run, answers(*rows)).job == "12"
    assert run_status.read_status(run, answers(queued(state="NODE_FAIL"), queued("15", "CANCELLED"))).state == "crashed"


def test_a_job_that_was_resumed_and_failed_at_once(run: RunDir) -> None:
    attempt(run, 2, restart=1, first_step=6, cause="stopped", last_step=8)
    Ledger(run).remember(Decision("12", 1, "exit", "stopped by the user at step 8"))
    assert run_status.read_status(run, answers(queued(state="FAILED"))).state == "stopped"
    run.slurm.mkdir()
    run.jobs.write_text("15\n")
    account = Accounted("15", "FAILED", "8:0", NOW, "n1")
    told = run_status.read_status(run, answers(queued("15", "FAILED"), accounts={"15": account}))
    assert told.state == "crashed"
    assert "job 15 on n1 ended: FAILED: its script ended with exit code 8" in told.detail


def test_a_second_job_that_was_refused_tells_nothing_of_the_run(run: RunDir) -> None:
    """It met the first at work, and the first has ended since."""
    run.slurm.mkdir()
    run.jobs.write_text("15\n")
    account = Accounted("15", "FAILED", "9:0", NOW, "n1")
    rows = answers(queued(state="FAILED"), queued("15", "FAILED"), accounts={"15": account})
    Ledger(run).refuse("15", 0, RunDirError("--run-dir is in use by attempt 2"))
    attempt(run, 2, restart=1, first_step=6, cause="stopped", last_step=8, ended="2026-01-02T09:00:00Z")
    assert run_status.read_status(run, rows).job == "15", "refused after the end of the other: its own word counts"
    attempt(run, 2, restart=1, first_step=6, cause="stopped", last_step=8, ended="2999-01-02T09:00:00Z")
    Ledger(run).remember(Decision("12", 1, "exit", "stopped by the user at step 8"))
    told = run_status.read_status(run, rows)
    assert (told.state, told.job, told.detail) == ("stopped", "12", "stopped by the user at step 8")


def test_a_successor_that_nobody_knows_is_not_promised(run: RunDir) -> None:
    attempt(run, 2, restart=1, first_step=6, cause="preempted", last_step=8)
    Ledger(run).remember(Decision("12", 1, "resubmit", "preempted at step 8"))
    assert "was to be submitted again, as a job that is not known" in run_status.read_status(run).detail
    run.slurm.mkdir()
    run.jobs.write_text("15\n")
    assert "job 12 was submitted again as job 15" in run_status.read_status(run).detail


def test_a_directory_that_may_not_be_read_is_left_out(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As root may read all, the refusal is raised here where the system would raise it for others."""
    (run.path.parent / "theirs").mkdir()
    is_run = runs.is_run

    def refused(path: Path) -> bool:
        if path.name == "theirs":
            raise PermissionError(13, "Permission denied", str(path / "config.yaml"))
        return is_run(path)

    monkeypatch.setattr(runs, "is_run", refused)
    assert runs.within([run.path.parent]) == [run.path]
    assert "theirs is left out: Permission denied" in capsys.readouterr().err


def test_what_is_read_beside_the_state(run: RunDir) -> None:
    told = run_status.read_status(run, answers(queued(excluded="n[3-4]", state="PENDING", reason="Priority")))
    assert (told.step, told.steps, told.loss, told.tokens_per_s, told.mfu) == (8, 12, 5.0, 256.0, 0.4)
    assert (told.excluded, told.suspects, told.restarts) == (["n3", "n4"], ["n7"], {"preempted": 1})
    assert (told.limit_s, told.left_s, told.expected_start) == (7200.0, None, "2026-01-02 10:00:00")
    assert (told.eta_s, told.jobs_needed) == (4.0, 1)  # four steps of a second


def row(**facts: Any) -> RunStatus:
    return RunStatus(
        "mine",
        "running",
        12_000,
        19_073,
        3.21,
        3.3,
        4,
        77,
        "job 12 on n1, pid 77 on n1, 8 ranks",
        path="runs/mine",
        **facts,
    )


def test_the_table_fits_and_says_all() -> None:
    told = row(
        tokens_per_s=1_234_567.0,
        mfu=0.412,
        eta_s=5 * 3600,
        jobs_needed=2,
        limit_s=7200.0,
        restarts={"crashed": 1, "preempted": 2},
        excluded=["n7"],
    )
    shown = status_table.table([told], 100)
    assert max(map(len, shown.splitlines())) <= 100
    assert "running      12000/19073    63%  3.2100  3.3000   1.23M 41.2%  5:00:00        3" in shown
    assert "finish in 5:00:00 of running, with 2 more jobs of 2:00:00" in shown
    assert "restarts 3: 2 preempted, 1 crashed" in shown
    assert "nodes excluded: n7" in shown
    assert "next:" not in shown


def test_long_texts_are_wrapped_on_a_terminal_only() -> None:
    long = dataclasses.replace(row(), detail="word " * 60)
    assert max(map(len, status_table.table([long], 100).splitlines())) <= 100
    assert max(map(len, status_table.table([long], None).splitlines())) > 250


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "-"), (950.0, "950"), (41_234.0, "41.2k"), (999_900.0, "1000k"), (1.5e6, "1.5M")]
)
def test_rates(rate: float | None, text: str) -> None:
    assert status_table.rate(rate) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (59.0, "0:59"), (3700.0, "1:01:40"), (200_000.0, "2d 07h")])
def test_spans(seconds: float | None, text: str) -> None:
    assert status_table.span(seconds) == text
