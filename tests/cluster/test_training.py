"""Real jobs on a real Slurm, with real DDP ranks: each ends with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc.reporting import run_status
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.cluster.kit import (
    ROOT,
    SAVE_EVERY,
    STEPS,
    Ended,
    Job,
    Kit,
    bytes_of,
    drives,
    finished_as,
    logged_once,
    long,
    resumed_exactly,
)

pytestmark = pytest.mark.timeout(1200)


# Undisturbed --------------------------------------------------------------------------------------------------------


def drive_sbatch(kit: Kit) -> Ended:
    with kit.nodes() as nodes:
        job = kit.sbatch("sbatch", "-w", nodes, env={"PYTHONUNBUFFERED": "1"})
        return Ended(job, kit.until_ended(job))


def drive_submit(kit: Kit) -> Ended:
    with kit.nodes() as nodes:
        job = kit.submit("by submit", nodes=nodes)
        with pytest.raises(AssertionError, match=f"job {job.number} of --run-dir=.* is in the queue already"):
            kit.submit("by submit", nodes=nodes)
        return Ended(job, kit.until_ended(job))


@drives(drive_sbatch, drive_submit)
def test_both_ways_train_on_two_nodes(driven: list[Ended]) -> None:
    by_sbatch, by_submit = driven
    finished_as(by_sbatch, by_sbatch, causes=["finished"])
    finished_as(by_submit, by_sbatch, causes=["finished"])
    for each in driven:
        assert re.findall(r"(?m)^\d+: *$", each.job.told()) == []  # the end of a line, written by itself
    attempt = by_submit.job.attempts[0]
    assert attempt["world_size"] == 4
    assert attempt["nodes"] == by_submit.slurm["NodeList"]
    assert by_submit.slurm["NumNodes"] == "2"


def test_a_job_that_slurm_refuses_leaves_nothing(kit: Kit) -> None:
    with pytest.raises(AssertionError, match="sbatch refused the job: invalid partition specified: nowhere"):
        kit.submit("refused-at-once", "--partition", "nowhere", nodes="n1,n2")
    assert not (kit.folder / "runs" / "refused-at-once").exists()


@drives(drive_submit)
def test_a_job_that_slurm_refuses_changes_nothing(driven: Ended, kit: Kit) -> None:
    run = driven.job.run
    before = {path: path.read_bytes() for path in (run.config, *run.slurm.iterdir())}
    longer = replace(kit.settings(), train=replace(kit.settings().train, total_steps=2 * STEPS))
    with pytest.raises(AssertionError, match="sbatch refused the job"):
        kit.submit("by submit", "--partition", "nowhere", settings=longer, nodes="n1,n2")
    assert {path: path.read_bytes() for path in (run.config, *run.slurm.iterdir())} == before


def drive_without_gpt2hpc(kit: Kit) -> Ended:
    with kit.nodes() as nodes:
        job = kit.sbatch("without-gpt2hpc", "-w", nodes, env={"PYTHON": "/usr/bin/python3", "PYTHONPATH": ""})
        return Ended(job, kit.until_ended(job))


@drives(drive_without_gpt2hpc)
def test_a_python_without_gpt2hpc_says_so(driven: Ended) -> None:
    assert (driven.slurm["ExitCode"], driven.slurm["Restarts"]) == ("8:0", "0")
    assert "gpt2hpc: not installed for /usr/bin/python3; activate its environment" in driven.job.told()


# Time limits --------------------------------------------------------------------------------------------------------


@long
def drive_time_limit_signal(kit: Kit) -> Ended:
    """The signal comes 20 s before the end, or up to half a minute earlier still; when that was twice, the rest goes fast,
    and has ten minutes: on a busy machine one is over before much is done.
    """
    with kit.nodes() as nodes:
        job = kit.sbatch("limit-signal", "-w", nodes, "--time=2", "--signal=USR2@20", env={"KIT_PACE_S": "3"})
        kit.until(job, lambda: len(job.attempts) > 2, "two restarts", seconds=600)
        (job.run.path / "pace").write_text("0")
        kit.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
        return Ended(job, kit.until_ended(job, seconds=500))


@long
def drive_time_limit_clock(kit: Kit) -> Ended:
    """As a user whose cluster sends no signal: the line is deleted from the script."""
    template = kit.folder / "unsignalled.sbatch"
    lines = (ROOT / "slurm" / "train_124m.sbatch").read_text().splitlines(keepends=True)
    template.write_text("".join(line for line in lines if "--signal" not in line))
    with kit.nodes() as nodes:
        settings = kit.settings(stop_margin_s=60.0)
        job = kit.sbatch(
            "limit-clock", "-w", nodes, "--time=2", settings=settings, template=template, env={"KIT_PACE_S": "0.6"}
        )
        return Ended(job, kit.until_ended(job, seconds=500))


@drives(drive_sbatch, drive_time_limit_signal)
def test_several_time_limits_with_a_signal(driven: list[Ended]) -> None:
    undisturbed, job = driven
    first, second, *others, _ = job.job.causes
    assert (first, second) == ("preempted", "preempted")
    assert set(others) <= {"preempted", "time_limit"}  # the third may have begun with the old end in mind
    restarts = int(job.slurm["Restarts"])  # of which one may have been told to end before it began
    finished_as(job, undisturbed, causes=[first, second, *others, "finished"], restarts=restarts)
    resumed_exactly(job)


@drives(drive_sbatch, drive_time_limit_clock)
def test_a_time_limit_without_any_signal(driven: list[Ended]) -> None:
    undisturbed, job = driven
    causes = job.job.causes
    assert len(causes) >= 2
    finished_as(job, undisturbed, causes=[*["time_limit"] * (len(causes) - 1), "finished"])
    resumed_exactly(job)


# Signalled ----------------------------------------------------------------------------------------------------------


def drive_signals(kit: Kit) -> Ended:
    """USR2 to the batch shell alone, then to the ranks alone, then to everything."""
    with kit.nodes() as nodes:
        job = kit.sbatch("signals", "-w", nodes, "--no-requeue")
        kit.until_step(job, 5)
        kit.signal(job, "--batch", "--signal=USR2")
        kit.until_step(job, SAVE_EVERY + 5)
        kit.signal(job, "--signal=USR2")
        kit.until(job, lambda: len(job.attempts) > 1, "the restart after a signal to the ranks")
        kit.until_step(job, job.attempts[0]["last_step"] + 5)
        kit.signal(job, "--full", "--signal=USR2")
        return Ended(job, kit.until_ended(job))


@drives(drive_sbatch, drive_signals)
def test_signals_of_the_user_and_a_job_that_must_not_be_requeued(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["preempted", "preempted", "finished"])
    resumed_exactly(job)
    stops = {attempt["last_step"] for attempt in job.job.attempts}
    assert min(stops) > SAVE_EVERY  # the signal to the batch shell came long before, and did nothing
    assert set(tiny.losses(job.job.run, "save")) == {*range(SAVE_EVERY, STEPS + 1, SAVE_EVERY), *stops}  # one save each


def refused(kit: Kit, job: Job) -> list[Ended]:
    """The cluster does not let this job be requeued; its successor is another job."""
    kit.until_step(job, SAVE_EVERY + 5)
    kit.signal(job, "--signal=USR2")
    ended = Ended(job, kit.until_ended(job))
    number = job.told().split("goes on as job ")[1].split()[0]
    successor = replace(job, number=number, log=Path(str(job.log).replace(job.number, number)))
    return [ended, Ended(successor, kit.until_ended(successor))]


def drive_refused(kit: Kit) -> list[Ended]:
    with kit.nodes() as nodes:
        memory = ["--gpus-per-node=2", "--mem-per-gpu=50M"]
        return refused(kit, kit.sbatch("refused", "-w", nodes, "--job-name=stubborn", "--no-requeue", *memory))


def drive_refused_submit(kit: Kit) -> list[Ended]:
    with kit.nodes() as nodes:
        env = {"SBATCH_NO_REQUEUE": "1"}
        return refused(kit, kit.submit("refused-submit", "--job-name", "stubborn", nodes=nodes, env=env))


@drives(drive_sbatch, drive_refused, drive_refused_submit)
def test_a_refused_requeue_becomes_another_job(driven: list[Any]) -> None:
    undisturbed, *both = driven
    for first, second in both:
        assert first.slurm["ExitCode"] == "6:0"  # not 0: what depends on a finished run must not start
        assert second.slurm["NodeList"] == first.slurm["NodeList"]
        finished_as(second, undisturbed, causes=["preempted", "finished"], restarts=0)
        resumed_exactly(second)
    assert [job.slurm["MemPerTres"] for job in both[0]] == ["gres:gpu:50"] * 2


# Preempted ----------------------------------------------------------------------------------------------------------


def preempted(kit: Kit, name: str, partition: str, *, how: str = "sbatch", env: dict[str, str] | None = None) -> Ended:
    with kit.nodes() as nodes:
        if how == "sbatch":
            job = kit.sbatch(name, "-p", partition, "-w", nodes, env=env)
        else:
            job = kit.submit(name, "--partition", partition, nodes=nodes, env=env)
        kit.until_step(job, SAVE_EVERY + 5)
        kit.until_saved(job, SAVE_EVERY)
        at_step = job.step()
        kit.preempt(nodes.split(",")[1])
        return Ended(job, kit.until_ended(job), at_step)


def drive_preempted(kit: Kit) -> Ended:
    return preempted(kit, "preempted", "low")


def drive_preempted_submit(kit: Kit) -> Ended:
    return preempted(kit, "preempted-submit", "low", how="submit")


def drive_preempted_cancel(kit: Kit) -> Ended:
    return preempted(kit, "preempted-cancel", "lowc")


def drive_preempted_without_grace(kit: Kit) -> Ended:
    return preempted(kit, "preempted-without-grace", "low0")


def drive_preempted_after_the_last_step(kit: Kit) -> Ended:
    with kit.nodes() as nodes:
        job = kit.sbatch("preempted-late", "-p", "low", "-w", nodes, env={"KIT_PACE_S": "0", "KIT_LINGER_S": "90"})
        kit.until(job, job.run.finished.exists, "the last step")
        kit.preempt(nodes.split(",")[0])
        return Ended(job, kit.until_ended(job))


@drives(drive_sbatch, drive_preempted)
def test_preempted_with_a_grace(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["preempted", "finished"])
    resumed_exactly(job)
    assert job.job.attempts[0]["last_step"] >= job.at_step


@long
def drive_preempted_thrice(kit: Kit) -> Ended:
    with kit.nodes() as nodes:
        more = ["--train.tensorboard=true"]
        job = kit.sbatch("preempted-thrice", "-p", "low", "-w", nodes, more=more, env={"KIT_PACE_S": "0.3"})
        for times in range(1, 4):
            kit.until_step(job, job.step() + 10)
            kit.preempt(nodes.split(",")[times % 2])
            kit.until(job, lambda times=times: len(job.attempts) > times, f"restart {times}")  # type: ignore[misc]
        return Ended(job, kit.until_ended(job, seconds=600))


@drives(drive_sbatch, drive_preempted_thrice)
def test_preempted_three_times_each_step_is_logged_once(driven: list[Ended]) -> None:
    """In metrics.jsonl and log.txt, and for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    undisturbed, job = driven
    finished_as(job, undisturbed, causes=[*["preempted"] * 3, "finished"])
    resumed_exactly(job)
    told = EventAccumulator(str(job.job.run.tensorboard), size_guidance={"scalars": 0}).Reload()
    losses = {event.step: event.value for event in told.Scalars("train/loss")}
    assert [event.step for event in told.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert losses == pytest.approx(tiny.losses(job.job.run), abs=1e-5)


@drives(drive_sbatch, drive_preempted_submit)
def test_preempted_with_a_grace_when_submitted_by_submit(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["preempted", "finished"])
    resumed_exactly(job)


@drives(drive_sbatch, drive_preempted_cancel)
def test_preempted_where_preemption_cancels(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["preempted", "finished"])
    resumed_exactly(job)


@drives(drive_sbatch, drive_preempted_without_grace)
def test_preempted_without_grace_loses_at_most_one_save_interval(driven: list[Ended]) -> None:
    undisturbed, job = driven
    first, second = job.job.attempts
    finished_as(job, undisturbed, causes=[first["cause"], "finished"])
    assert first["cause"] in (None, "preempted")
    assert second["first_step"] > job.at_step - SAVE_EVERY


@drives(drive_sbatch, drive_preempted_after_the_last_step)
def test_preempted_after_the_last_step_is_finished(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["finished"])
    assert job.slurm["PreemptTime"] != "None"  # it was asked to go


def drive_stopped(kit: Kit) -> list[Ended]:
    """By the user's STOP; then the same command again, and once more with a STOP while it waits."""
    with kit.nodes() as nodes:
        first = kit.sbatch("stopped", "-w", nodes)
        kit.until_step(first, 5)
        first.run.stop.touch()
        ended = [Ended(first, kit.until_ended(first))]
        waiting = kit.sbatch("stopped", "-w", nodes, "--begin=now+3")
        time.sleep(1)  # a later time stamp than the outcome's, whatever the file system's clock
        first.run.stop.touch()
        ended.append(Ended(waiting, kit.until_ended(waiting)))
        last = kit.sbatch("stopped", "-w", nodes, "--mem-per-cpu=50M")
        return [*ended, Ended(last, kit.until_ended(last))]


@drives(drive_sbatch, drive_stopped)
def test_a_wish_to_stop_is_obeyed_once(driven: list[Any]) -> None:
    undisturbed, (first, waiting, last) = driven
    for job in (first, waiting):
        assert (job.slurm["JobState"], job.slurm["ExitCode"], job.slurm["Restarts"]) == ("FAILED", "6:0", "0")
    finished_as(last, undisturbed, causes=["stopped", "stopped", "finished"], restarts=0)
    assert " --mem-per-cpu=50 " in last.job.run.resume_script.read_text()


BUSY = """#!/bin/sh
# Slurm's own scontrol, but for the times when its controller is too busy to answer.
if [ -e {busy} ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
exec {scontrol} "$@"
"""


def drive_busy_controller(kit: Kit) -> Ended:
    """It does not answer while the job comes to its end."""
    programs, busy = kit.folder / "busy-bin", kit.folder / "busy"
    programs.mkdir()
    (programs / "scontrol").write_text(BUSY.format(busy=busy, scontrol=shutil.which("scontrol")))
    (programs / "scontrol").chmod(0o755)
    with kit.nodes() as nodes:
        job = kit.sbatch("busy-controller", "-w", nodes, env={"PATH": f"{programs}:{os.environ['PATH']}"})
        kit.until_step(job, SAVE_EVERY + 5)
        busy.touch()
        kit.signal(job, "--signal=USR2")
        kit.until(job, lambda: "Unable to contact" in job.told(), "the controller's silence")
        time.sleep(3)
        busy.unlink()
        return Ended(job, kit.until_ended(job))


@drives(drive_sbatch, drive_busy_controller)
def test_a_controller_that_does_not_answer_at_once(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["preempted", "finished"])
    resumed_exactly(job)


# Crashed ------------------------------------------------------------------------------------------------------------


def drive_killed(kit: Kit) -> Ended:
    with kit.nodes() as nodes:
        job = kit.sbatch("killed rank", "-w", nodes, env={"KIT_KILL": f"{SAVE_EVERY + 7} 3 once"})
        return Ended(job, kit.until_ended(job))


def drive_killed_always(kit: Kit) -> Ended:
    settings = replace(kit.settings(), requeue=replace(kit.settings().requeue, crash_budget=1))
    with kit.nodes() as nodes:
        env = {"KIT_KILL": f"{SAVE_EVERY + 7} 1", "KIT_PACE_S": "0.02"}
        job = kit.sbatch("killed-always", "-w", nodes, settings=settings, env=env)
        return Ended(job, kit.until_ended(job))


@drives(drive_sbatch, drive_killed)
def test_a_killed_rank(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["crashed", "finished"])
    first, second = job.job.attempts
    # The killed one's, or that of one which srun then ended while its Python was going down.
    assert first["exit_code"] in (137, 143)
    assert first["saved_step"] == second["first_step"] == SAVE_EVERY  # the survivors saved nothing
    assert "crash 1 of 3 allowed" in job.job.told()
    assert not [path for path in job.job.run.path.rglob("*") if path.name.endswith(".tmp")]


@drives(drive_killed_always)
def test_a_crash_at_the_same_step_uses_up_the_budget(driven: Ended) -> None:
    assert driven.slurm["JobState"] == "FAILED"
    assert driven.slurm["ExitCode"] == "7:0"
    assert driven.slurm["Restarts"] == "1"
    assert driven.job.causes == ["crashed", "crashed"]
    shown = run_status.read_status(driven.job.run)
    assert shown.state == "crashed"
    assert f"crashed 2 times without progress, last after step {SAVE_EVERY}" in shown.detail


def drive_no_cuda(kit: Kit) -> list[Ended]:
    settings = replace(kit.settings(), train=replace(kit.settings().train, device="auto"))
    with kit.nodes() as nodes:
        jobs = [
            kit.sbatch("no-cuda", "-w", nodes, "--gpus-per-node=2", settings=settings),
            kit.submit("no-cuda-submit", "--gpus-per-node", "2", nodes=nodes, settings=settings),
        ]
        return [Ended(job, kit.until_ended(job)) for job in jobs]


@drives(drive_no_cuda)
@pytest.mark.parametrize("how", [0, 1], ids=["sbatch", "submit"])
def test_gpus_without_cuda_are_an_error(driven: list[Ended], how: int) -> None:
    assert_no_cuda(driven[how])


def assert_no_cuda(driven: Ended) -> None:
    assert driven.slurm["JobState"] == "FAILED"
    assert driven.slurm["ExitCode"] == "8:0"
    assert driven.slurm["Restarts"] == "0"
    assert "CUDA is not available" in driven.job.told()
    assert "--device cpu" in driven.job.told()
    assert not driven.job.attempts
    assert "CUDA is not available" in run_status.read_status(driven.job.run).detail


def drive_wrong_setting(kit: Kit) -> Ended:
    with kit.nodes() as nodes:
        job = kit.sbatch("wrong-setting", "-w", nodes, more=["--optimizer.learning_rat=1"])
        return Ended(job, kit.until_ended(job))


@drives(drive_wrong_setting)
def test_a_wrong_setting_is_not_tried_again(driven: Ended) -> None:
    assert (driven.slurm["ExitCode"], driven.slurm["Restarts"]) == ("2:0", "0")
    assert "did you mean --optimizer.learning_rate?" in driven.job.told()


# Arrays -------------------------------------------------------------------------------------------------------------


def drive_array(kit: Kit) -> list[Ended]:
    """Two tasks side by side on one node; the one whose number is the whole array's is told to stop."""
    with kit.nodes() as nodes:
        node = nodes.split(",")[0]
        array = kit.sbatch("array", "--array=0-1", "--nodes=1", "-w", node, f"--output={kit.folder}/array-%a.log")
        tasks = [
            Job(f"{array.number}_{task}", RunDir(array.run.path / str(task)), kit.folder / f"array-{task}.log")
            for task in (0, 1)
        ]
        for task in tasks:
            kit.until_step(task, SAVE_EVERY + 5)
        ambiguous = next(task for task in tasks if kit.shown(task)["JobId"] == array.number)
        kit.signal(ambiguous, "--signal=USR2")
        ended = [Ended(task, kit.until_ended(task)) for task in tasks]
        return sorted(ended, key=lambda each: each.job is ambiguous)


@drives(drive_array)
def test_an_array_task_requeues_only_itself(driven: list[Ended]) -> None:
    other, ambiguous = driven
    assert ambiguous.job.causes == ["preempted", "finished"]
    assert other.job.causes == ["finished"]
    assert (other.slurm["Restarts"], ambiguous.slurm["Restarts"]) == ("0", "1")
    assert bytes_of(ambiguous.job)["files"] == bytes_of(other.job)["files"]
    logged_once(ambiguous.job)


@pytest.fixture(scope="session", autouse=True)
def _no_leftovers(kit: Kit) -> Any:
    yield
    assert not list(Path(kit.folder).glob("runs/*/checkpoints/*.tmp"))
