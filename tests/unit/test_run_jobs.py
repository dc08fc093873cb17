"""Which jobs are a run's, which of them wait, and what Slurm's words about them mean; all without a Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
from submitit.core.utils import FailedSubmissionError

from gpt2hpc.cluster import batch, orders, queries, run_jobs
from gpt2hpc.cluster.dist_env import LOCAL, DistEnv
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.cluster.queries import Queued
from gpt2hpc.errors import Gpt2hpcError, MissingError, UsageError
from gpt2hpc.run_dir import RunDir
from tests import tiny


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "mine")
    run.create()
    (run.after / "evaluate").mkdir(parents=True)
    return run


def test_an_odd_line_spoils_no_question(run: RunDir) -> None:
    """One number that is none is an error to squeue, for all runs that it is asked about."""
    run.jobs.write_text("12\nsbatch: error: 4 things\n100_3\n7;cluster\n")
    run.job_logs.write_text("13 /a/log.out\n0x /b/log.out\n")
    Ledger(run).claim(DistEnv(0, 0, 1, 1, "local-12", 0, "n1", is_launched=True, node="n1"))
    assert run_jobs.numbers(run) == {"12", "100_3", "13"}


def test_what_comes_after_a_training_is_no_job_of_it(run: RunDir) -> None:
    (run.slurm / "20_submitted.pkl").touch()
    (run.after / "evaluate" / "21_submitted.pkl").touch()
    run.dependents.write_text("21\n22\n")
    assert run_jobs.numbers(run) == {"20"}
    assert run_jobs.after(run) == {"21", "22"}


def test_what_a_job_goes_on_as(run: RunDir) -> None:
    run.jobs.write_text("9\n")
    assert run_jobs.successor(run, "12") is None
    run.jobs.write_text("9\n13\n")
    assert run_jobs.successor(run, "12") == "13"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"100_3"}, "100_3"),
        ({"100_9"}, None),
        ({"100"}, "100_2"),
        ({"101"}, "101"),
        ({"10"}, None),
    ],
)
def test_a_task_is_not_its_neighbour(known: set[str], expected: str | None) -> None:
    assert queries.first_of(known, ["100_2", "100_3", "101"]) == expected


@pytest.mark.parametrize(
    ("state", "reason", "waits", "held"),
    [
        ("PENDING", "Priority", True, False),
        ("PENDING", "JobHeldUser", True, True),
        ("REQUEUE_HOLD", "BeginTime", True, True),
        ("SPECIAL_EXIT", "None", True, True),
        ("REQUEUED", "None", True, False),
        ("SIGNALING", "None", False, False),
        ("STAGE_OUT", "JobHeldUser", False, False),
    ],
)
def test_who_waits_and_who_is_held(state: str, reason: str, *, waits: bool, held: bool) -> None:
    row = Queued("12", state, reason, start="", nodes="", left="", partition="gpu")
    assert (row.is_live, row.is_waiting, row.is_held) == (True, waits, held)


@pytest.mark.parametrize(
    ("said", "harmless"),
    [
        ("scancel: error: Kill job error on job id 5: Invalid job id specified\n", True),
        ("scancel: error: Kill job error on job id 5: Job/step already completing or completed", True),
        ("scancel: error: Kill job error on job id 5: Access/permission denied", False),
        (
            "scancel: error: Kill job error on job id 5: Invalid job id specified\nscancel: error: Unable to contact",
            False,
        ),
        ("", False),
    ],
)
def test_a_job_that_has_ended_is_as_good_as_cancelled(said: str, *, harmless: bool) -> None:
    assert orders.only_of_ended(said) == harmless


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Batch job submission failed: Requested node configuration is not available", UsageError),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", MissingError),
        ("Could not establish a configuration source", MissingError),
    ],
)
def test_a_refusal_is_not_taken_for_silence(
    said: str, error: type[Gpt2hpcError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = "sbatch refused" if error is UsageError else "does not answer"
    with pytest.raises(error, match=told), batch.refusals_explained():
        raise FailedSubmissionError(f"sbatch: error: {said}")


def test_a_training_by_hand_is_not_the_job_that_it_was_called_in(data: Path, run: RunDir) -> None:
    """Of `salloc` or `srun --pty bash`, say, which goes on, and which `cancel` must not end."""
    settings = tiny.config(data, total_steps=3)
    session = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "2"}
    done = tiny.gpt2hpc("train", "--run-dir", run.path, *tiny.flags(settings), env=session)
    assert done.returncode == 0, done.stderr
    (attempt,) = Ledger(run).attempts()
    assert (attempt.job.startswith(LOCAL), attempt.restart) == (True, 0)
    assert run_jobs.numbers(run) == set()
