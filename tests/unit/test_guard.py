"""When a guard takes over, and when it stays away, by what is known of the job that it guards."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from gpt2hpc import durable
from gpt2hpc.cluster.guard import main, take_over
from gpt2hpc.cluster.ledger import Cause, Decision, Ledger, Outcome
from gpt2hpc.cluster.requeue import Action
from gpt2hpc.cluster.slurm import Job
from gpt2hpc.run_dir import RunDir
from tests.unit.test_requeue import attempt


def shown(state: str, *, job: str = "7", restarts: int = 0) -> str:
    return f"JobId={job} JobName=a JobState={state} Restarts={restarts} NodeList=n1 Command=x"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Of job 7, which has begun and said nothing more."""
    run = RunDir(tmp_path)
    run.create()
    claim(run, restart=0)
    return run


def claim(run: RunDir, *, restart: int, job: str = "7") -> None:
    begun = dataclasses.replace(attempt(restart, job=job, cause=None), number=len(Ledger(run).attempts()) + 1)
    durable.publish_json(run.attempt(begun.number), dataclasses.asdict(begun))


def asked(run: RunDir, state: str, *, restarts: int = 0) -> Action:
    return take_over(run, shown(state, restarts=restarts), job="7", by="8")


@pytest.mark.parametrize("state", ["FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "PREEMPTED"])
def test_it_takes_over_from_a_job_that_ended_without_a_word(run: RunDir, state: str) -> None:
    action = asked(run, state)
    assert action.kind == "start"
    assert "takes over, crash 1 of 3 allowed (ended without a word)" in action.reason
    assert Ledger(run).attempts()[0].cause == Cause.CRASHED


def test_it_takes_over_from_one_that_saved_and_could_not_go_on(run: RunDir) -> None:
    ledger = Ledger(run)
    ledger.close(ledger.attempts()[0], Outcome(1, "7", 0, Cause.PREEMPTED, 50))
    ledger.remember(Decision("7", 0, "resubmit", "preempted at step 50"))
    assert asked(run, "FAILED").reason == "takes over, preempted at step 50"


@pytest.mark.parametrize("cause", [Cause.STOPPED, Cause.DIVERGED, Cause.ERROR])
def test_it_stays_away_from_an_end_that_was_meant(run: RunDir, cause: Cause) -> None:
    ledger = Ledger(run)
    ledger.close(ledger.attempts()[0], Outcome(1, "7", 0, cause, 50, exit_code=4 if cause is Cause.ERROR else None))
    action = asked(run, "FAILED")
    assert (action.kind, action.exit_code) == ("exit", {Cause.STOPPED: 6, Cause.DIVERGED: 5, Cause.ERROR: 4}[cause])


@pytest.mark.parametrize("state", ["CANCELLED", "RUNNING", "PENDING", "REQUEUED", "SPECIAL_EXIT", "STAGE_OUT"])
def test_it_brings_back_nothing_that_was_cancelled_or_goes_on(run: RunDir, state: str) -> None:
    assert (asked(run, state).kind, asked(run, state).exit_code) == ("exit", 6)
    assert Ledger(run).attempts()[0].cause is None


def test_it_stays_away_where_nobody_knows_how_the_other_ended(run: RunDir) -> None:
    """It may have been cancelled, with too little time to say so."""
    action = asked(run, "")
    assert (action.kind, action.exit_code) == ("exit", 6)
    assert "nobody knows any more" in action.reason
    Ledger(run).remember(Decision("7", 0, "requeue", "preempted at step 50"))
    assert asked(run, "").kind == "exit"


def test_it_abides_by_what_it_decided_when_that_was_known(run: RunDir) -> None:
    """It was requeued before an attempt of its own, and Slurm has forgotten the other job meanwhile."""
    assert asked(run, "FAILED", restarts=2).kind == "start"
    for _ in range(2):
        action = asked(run, "")
        assert (action.kind, action.reason) == ("start", "takes over, crash 1 of 3 allowed (ended without a word)")
    assert take_over(run, shown(""), job="7", by="9").kind == "exit"  # another guard knows nothing
    Ledger(run).remember(Decision("7", 2, "cancelled", "cancelled with `gpt2hpc cancel`"))
    assert asked(run, "").kind == "exit"


def test_it_takes_over_what_has_left_to_it(run: RunDir) -> None:
    Ledger(run).close(Ledger(run).attempts()[0], Outcome(1, "7", 0, Cause.PREEMPTED, 50))
    Ledger(run).remember(Decision("7", 0, "resubmit", "preempted at step 50"))
    assert asked(run, "").reason == "takes over, preempted at step 50"


def test_it_stays_away_where_another_job_has_taken_over(run: RunDir) -> None:
    claim(run, restart=0, job="9")
    assert "job 9 has taken over already" in asked(run, "FAILED").reason


def test_it_goes_on_as_itself_after_a_restart_of_its_own(run: RunDir) -> None:
    claim(run, restart=0, job="8")
    assert asked(run, "FAILED").kind == "start"


def test_guard_after_guard_ends_where_none_gets_further(run: RunDir) -> None:
    reasons = []
    for number in range(7, 13):
        job, by = str(number), str(number + 1)
        before = [str(each) for each in range(number - 1, 6, -1)]
        action = take_over(run, shown("FAILED", job=job), job=job, by=by, succeeds=before)
        reasons.append(action.kind)
        claim(run, restart=0, job=by)
    assert reasons == ["start"] * 3 + ["exit"] * 3


def own(nodes: str, *, excluded: str = "", required: str = "", restarts: int = 0) -> Job:
    return Job("8", restarts, restarts=restarts, nodes=nodes, excluded=excluded, required=required)


def suspect(run: RunDir, *nodes: str) -> None:
    Ledger(run).note(Ledger(run).attempts()[0], suspects=nodes)


def replaced(run: RunDir, guard: Job, *, excluded: str = "(null)") -> tuple[str, str]:
    """What it does, and what it keeps away from; the other job excluded these."""
    action = take_over(
        run, f"{shown('FAILED')} ".replace(" Command", f" ExcNodeList={excluded} Command"), job="7", by="8", own=guard
    )
    return action.kind, action.exclude_nodes


def test_it_gives_back_a_bad_node(run: RunDir) -> None:
    suspect(run, "n1")
    assert replaced(run, own("n[1-2]", excluded="n9"), excluded="n[8-9]") == ("requeue", "n9,n8,n1")
    assert replaced(run, own("n[2-3]", excluded="n8,n9,n1", restarts=1), excluded="n[8-9]") == ("start", "n8,n9,n1")


def test_it_gives_back_what_the_other_had_come_to_exclude(run: RunDir) -> None:
    """Its own list is of the time when it was submitted."""
    assert replaced(run, own("n[5-6]"), excluded="n5") == ("requeue", "n5")


def test_on_other_nodes_it_keeps_away_later(run: RunDir) -> None:
    suspect(run, "n1")
    assert replaced(run, own("n[2-3]", excluded="n9")) == ("start", "n9,n1")


def test_it_keeps_a_bad_node_that_it_was_to_have_or_gets_again_and_again(run: RunDir) -> None:
    suspect(run, "n1")
    assert replaced(run, own("n[1-2]", required="n1"))[0] == "start"
    kinds = [replaced(run, own("n[1-2]", restarts=restarts))[0] for restarts in range(5)]
    assert kinds == ["requeue"] * 3 + ["start"] * 2


@pytest.mark.parametrize(
    ("asked_of", "told"),
    [
        ([shown("FAILED")], "requeue 6 0 0 - takes over, crash 1 of 3 allowed"),
        ([shown("FAILED"), shown("RUNNING", job="8")], "start 6 0 0 - takes over, crash 1 of 3 allowed"),
    ],
)
def test_a_guard_that_an_earlier_version_queued_is_understood(
    run: RunDir,
    asked_of: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its script asks of the other job alone, and goes on at `requeue`."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in asked_of)))
    assert main([str(run.path), "--job", "7", "--by", "8"]) == 0
    assert capsys.readouterr().out.startswith(told)
