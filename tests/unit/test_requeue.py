"""Every row of the decision table, and what must not happen in each."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc import config_io, jobs, opening, starting
from gpt2hpc.cluster import requeue
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.ledger import Attempt, Cause, Ledger, Outcome
from gpt2hpc.cluster.requeue import Action, decide
from gpt2hpc.cluster.slurm import Job, expand_nodes, parse_show_job
from gpt2hpc.config import Config, RequeueConfig
from gpt2hpc.data.patience import HubDownError
from gpt2hpc.errors import Gpt2hpcError, NodeError, UsageError
from gpt2hpc.run_dir import RunDir
from tests import tiny

LIMITS = RequeueConfig(crash_budget=2, max_without_progress=4, backoff_s=30.0)


def attempt(
    restart: int,
    *,
    first: int = 0,
    saved: int | None = None,
    cause: Cause | None = Cause.CRASHED,
    job: str = "7",
    nodes: str = "n1",
    **more: Any,
) -> Attempt:
    return Attempt(
        number=restart + 1,
        job=job,
        restart=restart,
        host="n1",
        pid=1,
        started="2026-01-31T12:00:00Z",
        process="x",
        nodes=nodes,
        world_size=1,
        first_step=first,
        saved_step=first if saved is None else saved,
        cause=cause,
        **more,
    )


def outcome(cause: Cause, *, restart: int = 0, job: str = "7", number: int | None = None, **more: Any) -> Outcome:
    return Outcome(restart + 1 if number is None else number, job, restart, cause, 50, **more)


def ask(job: Job, found: Outcome | None, attempts: list[Attempt] | None = None, *, finished: bool = False) -> Action:
    return decide(job, found, attempts if attempts is not None else [attempt(job.restart)], LIMITS, finished=finished)


def test_finished() -> None:
    for state in ("RUNNING", "COMPLETING"):
        action = ask(Job("7", 0, state=state, exit_code=0), outcome(Cause.PREEMPTED), finished=True)
        assert (action.kind, action.exit_code) == ("exit", 0)
        mine = [attempt(0, cause=Cause.FINISHED)]  # and killed on its way out
        action = ask(Job("7", 0, state=state, exit_code=137), None, mine, finished=True)
        assert (action.kind, action.exit_code) == ("exit", 0)
    # Its run is to go further since: that is for whoever wants it to.
    action = ask(Job("7", 0, exit_code=0), outcome(Cause.FINISHED), mine)
    assert (action.kind, action.exit_code) == ("exit", 0)


def test_a_finished_run_does_not_hide_the_failure_of_a_later_start() -> None:
    """Which was to make it longer, but did not get as far as saying so."""
    before = [attempt(0, job="6", cause=Cause.FINISHED)]
    assert ask(Job("7", 0, exit_code=3), None, before, finished=True).exit_code == 3
    assert ask(Job("7", 0, exit_code=143, preempted=True), None, before, finished=True).kind == "requeue"
    assert ask(Job("7", 0, exit_code=1), None, before, finished=True).kind == "requeue"


@pytest.mark.parametrize(("cause", "code"), [(Cause.DIVERGED, 5), (Cause.STOPPED, 6)])
def test_never_requeued(cause: Cause, code: int) -> None:
    action = ask(Job("7", 0, exit_code=0), outcome(cause))
    assert (action.kind, action.exit_code) == ("exit", code)


def test_an_error_of_the_users_keeps_its_code_and_line() -> None:
    action = ask(Job("7", 0, exit_code=137), outcome(Cause.ERROR, exit_code=4, message="data.dir=x is damaged"))
    assert (action.kind, action.exit_code, action.reason) == ("exit", 4, "data.dir=x is damaged")
    action = ask(Job("7", 0, exit_code=3), None, [])
    assert (action.kind, action.exit_code) == ("exit", 3)


@pytest.mark.parametrize(
    "job",
    [
        Job("7", 0, state="COMPLETING"),  # scancel, or the end of the time limit from outside
        Job("7", 0, restarts=1),  # somebody requeued it already
        Job("7", 0, cancelled=True),
    ],
)
def test_a_cancelled_job_is_not_resurrected(job: Job) -> None:
    for found in (outcome(Cause.PREEMPTED), None):
        action = ask(job, found)
        assert (action.kind, action.exit_code) == ("exit", 6)
        assert action.cancelled == (job.restarts == job.restart)


@pytest.mark.parametrize("cause", [Cause.PREEMPTED, Cause.TIME_LIMIT])
def test_preempted(cause: Cause) -> None:
    action = ask(Job("7", 0, exit_code=0), outcome(cause))
    assert (action.kind, action.delay_s) == ("requeue", 0)


def test_preempted_without_progress_ends() -> None:
    def after(count: int) -> Action:
        attempts = [attempt(restart, first=50, cause=Cause.PREEMPTED) for restart in range(count)]
        return ask(Job("7", count - 1, restarts=count - 1), outcome(Cause.PREEMPTED, restart=count - 1), attempts)

    assert [after(count).kind for count in (1, 2, 3, 4)] == ["requeue"] * 4
    assert (after(5).kind, after(5).exit_code) == ("exit", 7)


def test_progress_renews_the_patience() -> None:
    attempts = [
        attempt(restart, first=10 * restart, saved=10 * restart + 10, cause=Cause.TIME_LIMIT) for restart in range(30)
    ]
    assert ask(Job("7", 29, restarts=29), outcome(Cause.TIME_LIMIT, restart=29), attempts).kind == "requeue"


def test_crashes_use_up_the_budget() -> None:
    def after(count: int) -> Action:
        attempts = [attempt(restart, first=50) for restart in range(count)]
        return ask(Job("7", count - 1, restarts=count - 1, exit_code=137), None, attempts)

    assert (after(1).kind, after(1).delay_s) == ("requeue", 30)
    assert (after(2).kind, after(2).delay_s) == ("requeue", 60)
    assert (after(3).kind, after(3).exit_code) == ("exit", 7)
    assert "crashed 3 times" in after(3).reason
    assert "step 50" in after(3).reason


def test_a_crash_after_progress_counts_one() -> None:
    attempts = [attempt(0, first=0), attempt(1, first=0), attempt(2, first=0, saved=50)]
    action = ask(Job("7", 2, restarts=2), None, attempts)
    assert (action.kind, action.delay_s) == ("requeue", 30)


def test_a_preemption_between_crashes_renews_nothing() -> None:
    attempts = [attempt(0), attempt(1), attempt(2, cause=Cause.PREEMPTED), attempt(3)]
    assert ask(Job("7", 3, restarts=3), None, attempts).exit_code == 7


def test_the_jobs_that_a_successor_continues_count_too() -> None:
    """Else a crash that repeats where requeuing is refused would be resubmitted for ever."""
    older = [attempt(0, job="5"), attempt(0, job="6")]
    successor = Job("7", 0, exit_code=137, refused=True, succeeds=("6", "5"))
    assert ask(successor, None, [*older, attempt(0)]).exit_code == 7
    assert ask(Job("7", 0, exit_code=137, refused=True), None, [*older, attempt(0)]).kind == "resubmit"


def test_a_crash_before_the_claim_counts_too(tmp_path: Path) -> None:
    """An import that fails leaves no attempt; whoever sees it end writes that down."""
    run = RunDir(tmp_path)
    run.create()
    config_io.store(Config(requeue=LIMITS), run.config)
    kinds = [
        requeue.read_and_decide(run, Job("7", restart, restarts=restart, exit_code=1, nodes="n1")).kind
        for restart in range(3)
    ]
    assert kinds == ["requeue", "requeue", "exit"]
    assert "crashed 3 times" in Ledger(run).decision().reason  # type: ignore[union-attr]


def test_starts_that_nobody_saw_end_are_no_crashes() -> None:
    """Preempted without grace before they could claim an attempt, say."""
    later = [attempt(0, saved=50), attempt(4, first=50)]
    action = ask(Job("7", 4, restarts=4, exit_code=137), None, later)
    assert (action.kind, action.delay_s) == ("requeue", 60)  # two crashes, the one after progress included


def test_an_attempt_that_was_ended_from_outside_is_no_crash() -> None:
    """A node that failed, a preemption without grace: nobody was left to say why, and Slurm restarted the job."""
    attempts = [attempt(restart, cause=None) for restart in range(4)]
    action = ask(Job("7", 3, restarts=3, exit_code=137), None, attempts)
    assert (action.kind, action.delay_s) == ("requeue", 30)
    assert "crash 1 of 2" in action.reason


def test_preempted_before_anything_listened() -> None:
    for job in (Job("7", 0, exit_code=143, preempted=True), Job("7", 0, exit_code=140), Job("7", 0, exit_code=138)):
        action = ask(job, None, [])
        assert (action.kind, action.delay_s, action.reason) == ("requeue", 0, "signalled before it could save")


def test_an_error_before_the_claim_wins_over_what_srun_returned() -> None:
    refusal = outcome(Cause.ERROR, number=0, exit_code=8, message="no CUDA")
    action = ask(Job("7", 0, exit_code=143), refusal, [])
    assert (action.kind, action.exit_code, action.reason) == ("exit", 8, "no CUDA")
    assert ask(Job("7", 1, restarts=1, exit_code=143), refusal, [attempt(0), attempt(1)]).kind == "requeue"


def test_a_new_submission_gets_a_new_budget() -> None:
    attempts = [attempt(0, job="6"), attempt(1, job="6"), attempt(2, job="6"), attempt(0)]
    assert ask(Job("7", 0, exit_code=137), None, attempts).kind == "requeue"


def test_the_outcome_of_another_attempt_is_ignored() -> None:
    others = [
        outcome(Cause.STOPPED),
        outcome(Cause.DIVERGED, job="6", restart=1),
        outcome(Cause.STOPPED, restart=1, number=1),
    ]
    for found in others:
        action = ask(Job("7", 1, restarts=1, exit_code=137), found, [attempt(0), attempt(1)])
        assert (action.kind, action.delay_s) == ("requeue", 60)


@pytest.mark.parametrize(
    ("nodes", "excluded", "expected"),
    [
        (["n1"], "", ""),  # once may be chance
        (["n1", "n1"], "", "n1"),
        (["n[1-4]", "n[3,7-9]"], "", "n3"),  # the one they have in common
        (["n[1-4]", "n[1-4]"], "", ""),  # could be any of them
        (["n1", "n2"], "", ""),
        (["n1", "n1"], "x[1-2]", "x1,x2,n1"),  # the user's own list stays
        (["n1", "n1"], "n1", ""),
        (["n1", ""], "", ""),  # one died before it could say where
    ],
)
def test_a_bad_node_is_excluded(nodes: list[str], excluded: str, expected: str) -> None:
    attempts = [attempt(restart, nodes=each) for restart, each in enumerate(nodes)]
    last = len(nodes) - 1
    action = ask(Job("7", last, restarts=last, exit_code=137, excluded=excluded), None, attempts)
    assert (action.kind, action.exclude_nodes) == ("requeue", expected)


def test_a_node_that_the_user_insists_on_is_not_excluded() -> None:
    attempts = [attempt(0), attempt(1)]
    assert ask(Job("7", 1, restarts=1, exit_code=137), None, attempts).exclude_nodes == "n1"
    assert ask(Job("7", 1, restarts=1, exit_code=137, required="n[1-2]"), None, attempts).exclude_nodes == ""


def test_what_an_attempt_found_wanting_is_excluded_at_once() -> None:
    found = dataclasses.replace(attempt(0, nodes="n[1-4]"), suspects=("n3",))
    assert ask(Job("7", 0, exit_code=1, excluded="n9"), None, [found]).exclude_nodes == "n9,n3"
    assert ask(Job("7", 0, exit_code=1, required="n3"), None, [found]).exclude_nodes == ""


@pytest.mark.parametrize(("died_on", "expected"), [(["n2", "n2"], "n2"), (["n2", "n3"], ""), (["", "n2"], "")])
def test_a_node_where_a_rank_was_twice_the_first_to_end_is_excluded(died_on: list[str], expected: str) -> None:
    """The nodes alone would not tell: both attempts had the same four."""
    before = dataclasses.replace(attempt(0, nodes="n[1-4]"), died_on=died_on[0])
    now = attempt(1, nodes="n[1-4]", cause=None)
    action = ask(Job("7", 1, restarts=1, exit_code=137, died_on=died_on[1]), None, [before, now])
    assert (action.kind, action.exclude_nodes) == ("requeue", expected)


def test_a_preemption_excludes_no_node() -> None:
    attempts = [attempt(0), attempt(1), attempt(2, cause=Cause.PREEMPTED)]
    assert ask(Job("7", 2, restarts=2), outcome(Cause.PREEMPTED, restart=2), attempts).exclude_nodes == ""


def test_progress_clears_a_nodes_name() -> None:
    attempts = [attempt(0), attempt(1, saved=50), attempt(2, first=50, nodes="n2")]
    assert ask(Job("7", 2, restarts=2), None, attempts).exclude_nodes == ""


def test_a_refused_requeue_becomes_a_successor() -> None:
    refused = Job("7", 0, exit_code=137, refused=True)
    assert ask(refused, None).kind == "resubmit"
    assert ask(refused, outcome(Cause.PREEMPTED)).kind == "resubmit"
    assert ask(refused, outcome(Cause.STOPPED)).kind == "exit"
    assert ask(Job("7", 0, state="COMPLETING", refused=True), outcome(Cause.PREEMPTED)).kind == "exit"


def test_nodes_in_slurms_notation() -> None:
    assert expand_nodes("gpu[08-11,3],login,r[1]-ib") == ["gpu08", "gpu09", "gpu10", "gpu11", "gpu3", "login", "r1-ib"]
    assert expand_nodes("") == []


def test_backoff_is_bounded() -> None:
    limits = RequeueConfig(crash_budget=100, max_without_progress=100, backoff_s=30.0)
    attempts = [attempt(restart) for restart in range(20)]
    assert decide(Job("7", 19, restarts=19), None, attempts, limits, finished=False).delay_s == 600


SHOWN = (
    "JobId=123 ArrayJobId=120 ArrayTaskId=3 JobName=train UserId=me(1000) JobState=RUNNING Reason=None Requeue=1 "
    "Restarts=1 BatchFlag=1 PreemptTime=None ExitCode=0:0 NodeList=n[1-2] Command=/home/me/a b.sh JobState=FAILED Restarts=9\n"
)


def test_show_job_is_read() -> None:
    job = parse_show_job(SHOWN, restart=1, exit_code=0)
    assert job == Job("120_3", 1, state="RUNNING", restarts=1, exit_code=0, nodes="n[1-2]")
    other = parse_show_job(
        "JobId=9 JobState=COMPLETING Requeue=0 PreemptTime=2026-01-31T12:00:00 ExcNodeList=n[7-8] NodeList=(null)\n",
        restart=0,
        exit_code=None,
        refused=True,
    )
    expected = Job("9", 0, state="COMPLETING", may_requeue=False, preempted=True, refused=True, excluded="n[7-8]")
    assert other == expected
    for text in ("", "slurm_load_jobs error: Invalid job id specified\n"):
        with pytest.raises(UsageError, match="scontrol show job -o"):
            parse_show_job(text, restart=0, exit_code=None)


def test_the_command_prints_one_action(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO(SHOWN))
    (tmp_path / "attempts").mkdir()
    assert requeue.main(["decide", str(tmp_path), "--exit-code", "137"]) == 0
    assert capsys.readouterr().out == "requeue 6 10 0 - crash 1 of 3 allowed (exit code 137)\n"
    (tmp_path / "FINISHED").write_text('{"step": 19073}')
    monkeypatch.setattr(sys, "stdin", io.StringIO(SHOWN))
    assert requeue.main(["decide", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "exit 0 0 0 - finished\n"


def test_a_watchdog_ends_healthy_ranks() -> None:
    """So the node whose rank ended first tells nothing, whether or not there is another to suspect."""
    hung = [attempt(restart, nodes="n1,n2", died_on="n1", exit_code=NodeError.exit_code) for restart in (0, 1)]
    assert ask(Job("7", 1, restarts=1, exit_code=NodeError.exit_code, died_on="n1"), None, hung).exclude_nodes == ""
    stopped = [attempt(restart, nodes="n1,n2", died_on="n1", exit_code=137, suspects=("n2",)) for restart in (0, 1)]
    assert ask(Job("7", 1, restarts=1, exit_code=137, died_on="n1"), None, stopped).exclude_nodes == "n2"


def test_a_rank_that_is_killed_does_not_hide_a_hang(tmp_path: Path) -> None:
    """The healthy rank that told of the hang is the first to end, and another one is killed before it does."""
    run = RunDir(tmp_path)
    run.create()
    ledger = Ledger(run)
    for restart in (0, 1):
        claimed = ledger.claim(DistEnv(0, 0, 2, 1, job="7", restart=restart, nodes="n1,n2"))
        ledger.note(claimed, exit_code=NodeError.exit_code)
        action = requeue.read_and_decide(
            run, Job("7", restart, restarts=restart, exit_code=137, nodes="n1,n2", died_on="n1")
        )
    assert (action.kind, action.exclude_nodes) == ("requeue", "")
    assert [each.exit_code for each in ledger.attempts()] == [NodeError.exit_code] * 2


def test_a_node_that_lacks_gpus_is_left_out(tmp_path: Path) -> None:
    """It is known before an attempt can be claimed."""
    run = RunDir(tmp_path)
    run.create()
    env = DistEnv(4, 0, 8, 4, "7", 0, "n[1-2]", is_launched=True, node="n2")
    with pytest.raises(NodeError), jobs.refusal_noted(run, env):
        raise NodeError("two GPUs have gone")
    job = Job("7", 0, exit_code=NodeError.exit_code, nodes="n[1-2]", died_on="n1")
    action = requeue.read_and_decide(run, job)
    assert (action.kind, action.exclude_nodes) == ("requeue", "n2")


@pytest.mark.parametrize(("has_saved", "action", "code"), [(True, "requeue", 6), (False, "exit", 4)])
def test_a_hub_that_is_down_at_a_restart_is_no_end(
    has_saved: bool, action: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that has saved nothing yet says so at once."""

    def down(*args: object, **options: object) -> None:
        raise HubDownError("hf://datasets/some/data cannot be had: 503", "; try again later")

    monkeypatch.setattr(opening.starting, "check_start", down)
    run = RunDir(tmp_path)
    run.create()
    if has_saved:
        (run.checkpoints / "20260131-120000_tiny_step0000050").mkdir()
    env = DistEnv(0, 0, 2, 2, "7", 1, "n1", is_launched=True, node="n1")
    with pytest.raises(Gpt2hpcError, match="503") as caught, jobs.refusal_noted(run, env):
        opening.open_run(run, Config(), env)
    assert caught.value.exit_code == code
    found = requeue.read_and_decide(run, Job("7", 1, restarts=1, exit_code=code, nodes="n1"))
    assert (found.kind, found.exit_code, "503" in found.reason) == (action, code, not has_saved)


@pytest.mark.parametrize("lost", ["all", "a shard"])
@pytest.mark.parametrize(("has_saved", "action", "excluded"), [(True, "requeue", "n1"), (False, "exit", "")])
def test_a_node_that_does_not_see_the_data_is_left_out(
    has_saved: bool, action: str, excluded: str, lost: str, tmp_path: Path
) -> None:
    """Where the run has trained on it, so that it is somewhere."""
    data = tiny.make_data(tmp_path / "data")
    run = RunDir(tmp_path / "run")
    run.create()
    config = starting.check_start(run, tiny.config(data.where), world_size=1)[0]
    if has_saved:
        (run.checkpoints / "20260131-120000_tiny_step0000050").mkdir()
    if lost == "all":
        (tmp_path / "data").rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "data" / data.shards[0].file).unlink()
    env = DistEnv(0, 0, 2, 1, "7", 0, "n[1-2]", is_launched=True, node="n1")
    with pytest.raises(Gpt2hpcError) as caught, jobs.refusal_noted(run, env):
        opening.open_run(run, config, env)
    kind = type(caught.value)
    other = dataclasses.replace(env, rank=1, node="n2")  # which is told of it
    with pytest.raises(kind), jobs.refusal_noted(run, other):
        raise caught.value
    found = requeue.read_and_decide(run, Job("7", 0, exit_code=kind.exit_code, nodes="n[1-2]", died_on="n2"))
    assert (found.kind, found.exclude_nodes) == (action, excluded)
    if has_saved:
        assert caught.value.line.startswith("n1 does not see the data that the run has trained on: ")
    else:
        assert "gpt2hpc prepare" in caught.value.line


@pytest.mark.parametrize("cause", [Cause.PREEMPTED, Cause.TIME_LIMIT])
def test_a_wish_to_stop_during_the_save_of_a_preemption_is_heard(cause: Cause, tmp_path: Path) -> None:
    """STOP comes after the ranks have agreed to save and go on, and before their end is written down."""
    run = RunDir(tmp_path)
    run.create()
    ledger = Ledger(run)
    made = ledger.claim(DistEnv(0, 0, 1, 1, "7", 0, "n1", is_launched=True, node="n1"))
    run.stop.touch()
    ledger.close(made, Outcome(made.number, "7", 0, cause, 50))
    assert not opening._is_old(run), "the next start, of a job that Slurm itself has requeued, must obey it"
    elsewhere = requeue.read_and_decide(run, Job("7", 0, restarts=1, exit_code=0))
    assert (elsewhere.kind, ledger.attempts()[0].cause) == ("exit", cause)
    action = requeue.read_and_decide(run, Job("7", 0, exit_code=0))
    assert (action.kind, action.exit_code, action.reason) == ("exit", 6, "stopped by the user at step 50")
    assert ledger.attempts()[0].cause == "stopped"
    assert opening._is_old(run), "a later submission goes on"


def test_a_wish_that_was_obeyed_and_left_lying_is_old(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    ledger = Ledger(run)
    run.stop.touch()
    assert not opening._is_old(run)
    made = ledger.claim(DistEnv(0, 0, 1, 1, "7", 0, "n1", is_launched=True, node="n1"))
    ledger.close(made, Outcome(made.number, "7", 0, Cause.ERROR, 50))
    assert opening._is_old(run)
