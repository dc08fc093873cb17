"""What goes on where a job cannot requeue itself, and where: its guard, `resume.sh`, other nodes."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gpt2hpc.cluster import script
from gpt2hpc.cluster.slurm import expand_nodes
from gpt2hpc.run_dir import RunDir
from tests.cluster.kit import SAVE_EVERY, Ended, Job, Kit, drives, finished_as, new_kit, resumed_exactly
from tests.cluster.slurm import running
from tests.cluster.test_training import drive_sbatch

pytestmark = pytest.mark.timeout(1200)


def other(job: Job, number: str) -> Job:
    """Another job of the same run, with a log of its own."""
    return dataclasses.replace(job, number=number, log=Path(str(job.log).replace(job.number, number)))


def guard_of(kit: Kit, job: Job) -> Job:
    kit.until(job, (job.run.slurm / "guard").exists, "a guard")
    return other(job, (job.run.slurm / "guard").read_text().split()[0])


def waiting_for(kit: Kit, job: Job) -> Job:
    """A job of a pipeline, which waits for the run to finish."""
    command = [
        "sbatch",
        "--parsable",
        f"--dependency=afterok:{job.number}",
        "--kill-on-invalid-dep=yes",
        "--output=/dev/null",
    ]
    number = kit.cluster.run(*command, "--wrap", "true")
    job.run.slurm.mkdir(parents=True, exist_ok=True)
    job.run.dependents.write_text(f"{number}\n")
    return Job(number, RunDir(job.run.path), Path("none"))


def drive_killed_batch_shell(kit: Kit) -> list[Ended]:
    with kit.nodes() as nodes:
        job = kit.sbatch("guarded", "-w", nodes, "--hold", env={"GUARD": "1"})
        after = waiting_for(kit, job)
        kit.cluster.run("scontrol", "release", job.number)
        guard = guard_of(kit, job)
        kit.until_step(job, SAVE_EVERY + 5)
        kit.until_saved(job, SAVE_EVERY)
        os.kill(kit.cluster.batch_shell(job.number), signal.SIGKILL)
        return [Ended(each, kit.until_ended(each)) for each in (job, guard, after)]


@drives(drive_sbatch, drive_killed_batch_shell)
def test_a_guard_takes_over_where_the_batch_shell_was_killed(driven: list[object]) -> None:
    undisturbed, (job, guard, after) = driven  # type: ignore[misc]
    assert job.slurm["JobState"] == "FAILED"
    assert f"the guard of job {job.job.number}: takes over" in guard.job.told()
    assert guard.job.causes[0] in ("preempted", "crashed")
    finished_as(guard, undisturbed, causes=[guard.job.causes[0], "finished"], restarts=0)
    assert after.slurm["JobState"] == "COMPLETED"
    assert after.slurm["StartTime"] >= guard.slurm["EndTime"]


def drive_guard_of_a_cancelled_job(kit: Kit) -> list[Ended]:
    with kit.nodes() as nodes:
        job = kit.submit("guarded-cancelled", "--guard", nodes=nodes)
        guard = guard_of(kit, job)
        kit.until_step(job, 5)
        assert kit.shown(guard)["JobState"] == "PENDING"
        kit.signal(job)
        return [Ended(each, kit.until_ended(each)) for each in (job, guard)]


@drives(drive_guard_of_a_cancelled_job)
def test_a_guard_does_not_bring_back_what_was_cancelled(driven: list[Ended]) -> None:
    job, guard = driven
    assert job.slurm["JobState"] == "CANCELLED"
    if guard.slurm["JobState"] == "CANCELLED":
        assert guard.slurm["StartTime"] in ("Unknown", "None") or not guard.job.log.exists()
    else:  # the ranks took longer to end than Slurm waits until it kills the shell, which would have cancelled the guard
        assert guard.slurm["ExitCode"] == "6:0"
        assert f"job {job.job.number} was cancelled" in guard.job.told()
    assert len(job.job.attempts) == 1


def drive_refused_with_a_guard(kit: Kit) -> list[Ended]:
    with kit.nodes() as nodes:
        job = kit.sbatch("refused-guarded", "-w", nodes, "--job-name=stubborn", "--no-requeue", env={"GUARD": "1"})
        guard = guard_of(kit, job)
        kit.until_step(job, SAVE_EVERY + 5)
        kit.signal(job, "--signal=USR2")
        ended = [Ended(each, kit.until_ended(each)) for each in (job, guard)]
        last = (job.run.slurm / "guard").read_text().split()[0]
        return [*ended, Ended(other(job, last), kit.until_ended(other(job, last)))]


@drives(drive_sbatch, drive_refused_with_a_guard)
def test_a_guard_is_the_successor_where_a_requeue_is_refused(driven: list[object]) -> None:
    undisturbed, (job, guard, last) = driven  # type: ignore[misc]
    assert job.slurm["ExitCode"] == "6:0"
    assert f"goes on as job {guard.job.number}" in job.job.told()
    finished_as(guard, undisturbed, causes=["preempted", "finished"], restarts=0)
    resumed_exactly(guard)
    assert last.slurm["JobState"] == "CANCELLED"  # its own guard, with nothing left to do


def drive_second_job(kit: Kit) -> list[Ended]:
    """Somebody submits the run again while it goes on, with other nodes and another log."""
    with kit.nodes() as nodes:
        job = kit.sbatch("once only", "-w", nodes, env={"GUARD": "1"})
        guard_of(kit, job)
        kit.until_step(job, 5)
        kept = {
            path.name: path.read_text() for path in (job.run.resume_script, job.run.slurm / "job.sh", job.run.guard)
        }
        pace = job.run.path / "pace"
        pace.write_text("1")  # so that the first one is not done before the second has begun
        second = kit.sbatch("once only", "--nodes=1", "-w", nodes.split(",")[0], "--comment=second", env={"GUARD": "1"})
        ended = Ended(second, kit.until_ended(second))
        pace.unlink()
        assert {name: (job.run.slurm / name).read_text() for name in kept} == kept
        return [ended, Ended(job, kit.until_ended(job))]


@drives(drive_sbatch, drive_second_job)
def test_a_second_job_changes_nothing_that_the_first_has_kept(driven: list[object]) -> None:
    undisturbed, (second, job) = driven  # type: ignore[misc]
    assert second.slurm["ExitCode"] == "9:0"
    assert "is in use by attempt 1" in second.job.told()
    finished_as(job, undisturbed, causes=["finished"])


def test_a_job_that_slurm_has_forgotten_is_not_waited_for(kit: Kit) -> None:
    """A guard asks sacct then, and an empty answer is no answer."""
    (show,) = re.findall(r"(?ms)^show\(\) \{.*?^\}", script.text_of("set-up"))
    began = time.monotonic()
    told = kit.cluster.run("bash", "-c", f'{show}\nshow 99999999 || echo "forgotten"')
    assert told == "forgotten"
    assert time.monotonic() - began < 20


def drive_resumed_by_hand(kit: Kit) -> list[Ended]:
    """Submitted in a session that is a job itself, whose memory is not this one's; its `sbatch` has a limit of its own."""
    session = {
        "SLURM_MEM_PER_NODE": "90",
        "SLURM_MEM_PER_CPU": "80",
        "SLURM_JOB_NUM_NODES": "1",
        "SBATCH_TIMELIMIT": "1",
    }
    with kit.nodes() as nodes:
        job = kit.submit("by hand", nodes=nodes, env=session)
        kit.until_step(job, SAVE_EVERY + 5)
        kit.signal(job)
        ended = Ended(job, kit.until_ended(job))
        environment = {**kit.cluster.environment, **kit.variables}
        command = ["bash", str(job.run.resume_script), "--comment=again"]
        number = subprocess.run(
            command, env=environment, cwd="/", check=True, capture_output=True, text=True
        ).stdout.strip()
        again = dataclasses.replace(job, number=number, log=job.run.slurm / f"{number}_0_log.out")
        return [ended, Ended(again, kit.until_ended(again))]


@drives(drive_sbatch, drive_resumed_by_hand)
def test_a_cancelled_run_is_resumed_by_its_own_script(driven: list[object]) -> None:
    undisturbed, (job, again) = driven  # type: ignore[misc]
    assert job.slurm["JobState"] == "CANCELLED"
    assert again.slurm["Comment"] == "again"
    assert again.slurm["NodeList"] == job.slurm["NodeList"]
    finished_as(again, undisturbed, causes=[*again.job.causes[:1], "finished"], restarts=0)


def drive_bad_node(kit: Kit) -> Ended:
    """Two nodes of three, of which the first kills its ranks."""
    with kit.nodes() as nodes, kit.nodes() as more:
        bad, usable = nodes.split(",")[0], [*nodes.split(","), more.split(",")[0]]
        env = {"KIT_KILL": f"{SAVE_EVERY + 7} 1", "KIT_KILL_NODE": bad}
        job = kit.sbatch("bad-node", "--hold", f"--exclude={kit.others(usable)}", env=env)
        kit.release_on(job, usable)
        return Ended(job, kit.until_ended(job))


@drives(drive_sbatch, drive_bad_node)
def test_a_node_where_a_rank_dies_twice_is_left_out(driven: list[Ended]) -> None:
    undisturbed, job = driven
    bad = job.job.attempts[0]["died_on"]
    assert [attempt["died_on"] for attempt in job.job.attempts] == [bad, bad, ""]
    assert bad in job.slurm["ExcNodeList"]
    finished_as(job, undisturbed, causes=["crashed", "crashed", "finished"])


def drive_guard_on_a_bad_node(kit: Kit) -> list[Ended]:
    """Three nodes for two, of which the second is unfit; nobody is left to say so but the ledger."""
    with kit.nodes() as nodes, kit.nodes() as more:
        usable = [*nodes.split(","), more.split(",")[0]]
        bad = nodes.split(",")[1]  # Slurm prefers nodes that are neighbours
        env = {"GUARD": "1", "KIT_OTHER_DISK": bad}
        job = kit.sbatch("guard-bad-node", "--hold", f"--exclude={kit.others(usable)}", env=env)
        waiting = waiting_for(kit, job)
        kit.release_on(job, usable)
        guard = guard_of(kit, job)
        kit.until(job, lambda: kit.cluster.ranks(job.number), "ranks")
        shell = kit.cluster.batch_shell(job.number)
        os.kill(shell, signal.SIGSTOP)
        try:
            kit.until(job, lambda: job.attempts and job.attempts[0]["suspects"], "a suspect")
        finally:  # else it has its nodes for good
            os.kill(shell, signal.SIGKILL)
        return [Ended(each, kit.until_ended(each)) for each in (job, guard, waiting)]


@drives(drive_sbatch, drive_guard_on_a_bad_node)
def test_a_guard_gives_back_a_node_that_was_found_bad(driven: list[object]) -> None:
    undisturbed, (job, guard, waiting) = driven  # type: ignore[misc]
    (bad,) = job.job.attempts[0]["suspects"]
    assert job.slurm["JobState"] == "FAILED"
    assert f"takes over, but not on {bad}" in guard.job.told()
    assert bad in expand_nodes(guard.slurm["ExcNodeList"])
    assert set(expand_nodes(job.slurm["ExcNodeList"])) < set(expand_nodes(guard.slurm["ExcNodeList"]))
    finished_as(guard, undisturbed, causes=["crashed", "finished"], restarts=1)
    kept = guard.job.run.resume_script.read_text().replace("\\", "")
    assert f"--exclude={guard.slurm['ExcNodeList']}" in kept
    assert waiting.slurm["JobState"] == "COMPLETED"


def test_a_guard_that_is_preempted_takes_over_from_a_job_that_slurm_has_forgotten(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Before it has begun an attempt of its own."""
    with running(tmp_path_factory.mktemp("forgetful") / "slurm", nodes=2, conf="MinJobAge=20\n") as cluster:
        kit = new_kit(cluster, tmp_path_factory.mktemp("forgetful-kit"), pairs=1)
        job = kit.sbatch("forgotten", "-p", "low0", env={"GUARD": "1"})
        guard = guard_of(kit, job)
        kit.until_step(job, SAVE_EVERY + 5)
        os.kill(cluster.batch_shell(job.number), signal.SIGKILL)
        kit.until(guard, lambda: ": takes over" in guard.told(), "a guard")
        os.kill(cluster.batch_shell(guard.number), signal.SIGSTOP)
        kit.preempt("n1")
        kit.until(guard, lambda: kit.shown(guard)["Restarts"] == "1", "a preemption")
        cluster.run("scontrol", "hold", guard.number)
        kit.until(job, lambda: not cluster.run("scontrol", "show", "job", "-o", job.number, check=False), "forgetting")
        assert [attempt["job"] for attempt in job.attempts] == [job.number]
        cluster.run("scontrol", "release", guard.number)
        ended = kit.until_ended(guard)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), guard.told()
        assert guard.told().count(": takes over") == 2
        assert [attempt["job"] for attempt in job.attempts] == [job.number, guard.number]
