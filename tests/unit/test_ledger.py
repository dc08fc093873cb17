from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt2hpc import durable
from gpt2hpc.cluster import liveness
from gpt2hpc.cluster.dist_env import DistEnv, job_name
from gpt2hpc.cluster.ledger import Attempt, Cause, Fenced, Ledger, Outcome
from gpt2hpc.errors import RunDirError, UsageError
from gpt2hpc.run_dir import RunDir

ALONE = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n1")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "run")
    found.create()
    return found


def requeued(restart: int) -> DistEnv:
    return dataclasses.replace(ALONE, restart=restart)


def rewrite(run: RunDir, attempt: Attempt) -> None:
    durable.publish_json(run.attempt(attempt.number), dataclasses.asdict(attempt))


def test_a_second_start_is_refused_while_the_first_lives(run: RunDir) -> None:
    Ledger(run).claim(ALONE)
    with pytest.raises(RunDirError, match=r"in use by attempt 1 \(job 1, pid \d+"):
        Ledger(run).claim(dataclasses.replace(ALONE, job="2"))
    with pytest.raises(RunDirError):
        Ledger(run).claim(ALONE)


def test_a_dead_attempt_is_followed(run: RunDir) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    first = Ledger(run).claim(ALONE)
    rewrite(run, dataclasses.replace(first, pid=child.pid, process=liveness.process_identity(child.pid)))
    with pytest.raises(RunDirError):
        Ledger(run).claim(dataclasses.replace(ALONE, job="2"))
    child.kill()
    while liveness.process_identity(child.pid):
        time.sleep(0.01)  # a zombie, which nobody has waited for, is not alive
    assert Ledger(run).claim(dataclasses.replace(ALONE, job="2")).number == 2
    child.wait()


def test_another_process_with_the_same_pid_is_not_it(run: RunDir) -> None:
    first = Ledger(run).claim(ALONE)
    rewrite(run, dataclasses.replace(first, process=f"{liveness.machine_identity()}/1"))
    assert Ledger(run).claim(dataclasses.replace(ALONE, job="2")).number == 2


def test_a_requeue_fences_its_predecessor(run: RunDir) -> None:
    ledger = Ledger(run)
    zombie = ledger.claim(ALONE)
    ledger.fence(zombie)
    ledger.claim(requeued(1))
    with pytest.raises(Fenced, match="attempt 1 of"):
        ledger.fence(zombie)
    with pytest.raises(Fenced):
        ledger.update(zombie)
    with pytest.raises(Fenced):
        ledger.close(zombie, Outcome(1, "1", 0, Cause.FINISHED, 5))
    assert ledger.outcome() is None
    assert [attempt.restart for attempt in ledger.attempts()] == [0, 1]


def test_an_older_restart_does_not_supersede(run: RunDir) -> None:
    Ledger(run).claim(requeued(1))
    with pytest.raises(RunDirError):
        Ledger(run).claim(ALONE)


def test_of_many_claims_at_once_one_wins(run: RunDir) -> None:
    """All believe that they may start; the file system lets one."""
    won: list[Attempt] = []
    lost: list[RunDirError] = []
    together = threading.Barrier(8)

    def claim(number: int) -> None:
        together.wait()
        try:
            won.append(Ledger(run).claim(dataclasses.replace(ALONE, job=str(number))))
        except RunDirError as error:
            lost.append(error)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    assert [attempt.job for attempt in Ledger(run).attempts()] == [won[0].job]
    assert sorted(path.name for path in run.attempts.iterdir()) == ["0001.json"]


def test_on_another_host_the_heartbeat_counts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEAT_S", 0.2)
    ledger = Ledger(run)
    first = ledger.claim(ALONE)
    elsewhere = dataclasses.replace(first, process="another boot/another namespace/1")
    rewrite(run, elsewhere)
    with ledger.heartbeat(elsewhere, writes=True):
        assert ledger.alive(elsewhere)
        with pytest.raises(RunDirError):
            ledger.claim(dataclasses.replace(ALONE, job="2"))
    assert not ledger.alive(elsewhere)
    assert ledger.claim(dataclasses.replace(ALONE, job="2")).number == 2


def test_who_claims_while_another_looks_wins(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts after a dead node both wait for its heartbeat; only one may go on."""
    monkeypatch.setattr(liveness, "BEAT_S", 0.2)
    dead = dataclasses.replace(Ledger(run).claim(ALONE), process="another boot/another namespace/1")
    rewrite(run, dead)
    results: list[object] = []

    def claim(number: int) -> None:
        try:
            results.append(Ledger(run).claim(dataclasses.replace(ALONE, job=str(number))).number)
        except RunDirError:
            results.append("refused")

    threads = [threading.Thread(target=claim, args=(number,)) for number in (7, 8)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == ["2", "refused"]


def test_damaged_records_lock_nobody_out(run: RunDir) -> None:
    damaged = {"attempts/0001.json": "", "attempts/0002.json": '{"a": 1}', "FINISHED": "12", "outcome.json": '{"a": 1}'}
    for name, content in damaged.items():
        (run.path / name).write_text(content)
    ledger = Ledger(run)
    assert (ledger.finished_step(), ledger.outcome(), ledger.attempts()) == (None, None, [])
    assert ledger.claim(ALONE).number == 3


def test_finished_means_as_far_as_asked(run: RunDir) -> None:
    assert not Ledger(run).is_finished(12)
    durable.publish_json(run.finished, {"step": 12})
    assert Ledger(run).is_finished(12)
    assert not Ledger(run).is_finished(30), "extended, and not there yet"


def test_a_silent_heartbeat_file_is_no_life(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEAT_S", 0.1)
    ledger = Ledger(run)
    elsewhere = dataclasses.replace(ledger.claim(ALONE), process="another boot/another namespace/1")
    (run.attempts / "0001.beat").write_text("17")
    assert not ledger.alive(elsewhere)


def test_closing_tells_how_it_ended(run: RunDir) -> None:
    ledger = Ledger(run)
    attempt = ledger.claim(ALONE)
    ledger.close(attempt, Outcome(1, "1", 0, Cause.TIME_LIMIT, 17))
    assert ledger.outcome() == Outcome(1, "1", 0, Cause.TIME_LIMIT, 17)
    (closed,) = ledger.attempts()
    assert (closed.cause, closed.last_step) == ("time_limit", 17)
    assert not ledger.alive(closed)


def test_an_unwritable_run_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot be written"):
        RunDir(tmp_path / "file" / "run").create()


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}


def test_places_in_a_job() -> None:
    torchrun = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "9",
    }
    env = DistEnv.from_env({**torchrun, **STEP})
    assert (env.rank, env.local_rank, env.world_size, env.local_world_size) == (3, 1, 4, 2)
    assert (env.master_addr, env.master_port, env.is_launched) == ("a", 9, True)
    env = DistEnv.from_env({**STEP, "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"})
    assert (env.rank, env.local_rank, env.world_size, env.job, env.restart) == (5, 1, 8, "77", 2)
    array = {"SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "80", "SLURM_ARRAY_TASK_ID": "4"}
    assert DistEnv.from_env(array).job == "80_4"


def test_a_batch_shell_is_no_rank() -> None:
    env = DistEnv.from_env({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert (env.rank, env.world_size, env.is_launched) == (0, 1, False)
    assert not DistEnv.from_env({"MASTER_ADDR": "a", "MASTER_PORT": "9"}).is_launched


def test_tasks_of_this_node() -> None:
    step = {**STEP, "SLURM_JOB_ID": "7", "SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}
    assert [DistEnv.from_env({**step, "SLURM_NODEID": node}).local_world_size for node in "012"] == [3, 3, 2]
    assert DistEnv.from_env({**step, "SLURM_STEP_NUM_TASKS": "1"}).is_launched is False


def test_local_jobs_have_their_own_names() -> None:
    """A pid repeats, in containers at once, and an old outcome must not decide a new job."""
    assert job_name({}) != job_name({"SLURM_JOB_ID": "7"}) == "7"
    assert re.fullmatch(r"local-.+-\d{14}-\d+", job_name({}))


def test_gpus_are_noticed() -> None:
    assert DistEnv.from_env({"SLURM_JOB_GPUS": "0,1"}).gpus_allotted
    assert not DistEnv.from_env({}).gpus_allotted


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(UsageError, match="WORLD_SIZE=four"):
        DistEnv.from_env({"RANK": "0", "WORLD_SIZE": "four"})


def test_this_process_is_alive() -> None:
    assert liveness.process_identity(os.getpid())
    assert not liveness.process_identity(2**22 + 1)


def test_a_start_that_ended_before_its_claim_is_remembered_once(run: RunDir) -> None:
    ledger = Ledger(run)
    for _ in range(2):
        ledger.close_for("7", 0, "n[1-2]", Cause.CRASHED, 1)
    (unclaimed,) = ledger.unclaimed()
    assert (unclaimed.number, unclaimed.job, unclaimed.restart, unclaimed.nodes) == (0, "7", 0, "n[1-2]")
    assert ledger.attempts() == []
    assert ledger.newest() is None


def test_a_refusal_holds_until_the_same_start_gets_further(run: RunDir) -> None:
    """As when a command is run twice by hand in one allocation."""
    ledger, env = Ledger(run), DistEnv.from_env({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"})
    ledger.refuse("7", 0, UsageError("unknown option --x"))
    ledger.refuse("7", 0, UsageError("another rank's words"))
    refused = ledger.own_outcome("7", 0)
    assert refused is not None
    assert (refused.cause, refused.exit_code, refused.message) == (Cause.ERROR, 2, "unknown option --x")
    ledger.claim(env)
    assert ledger.own_outcome("7", 0) is None
