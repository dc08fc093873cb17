"""What may go wrong around a job, done to real ones; with the tests beside it, every fault that the kit promises to survive.

| what is done to a job | test |
| --- | --- |
| preempted in `low`, `lowc` | test_training: `test_preempted_with_a_grace`, `…_where_preemption_cancels` |
| the same with `preempt_send_user_signal` | `test_preempted_with_the_users_signal` |
| preempted in `low0`, without grace | test_training: `test_preempted_without_grace_loses_at_most_one_save_interval` |
| `-t 1 --signal=USR2@20` | test_training: `test_several_time_limits_with_a_signal` |
| a time limit without a signal | test_training: `test_a_time_limit_without_any_signal` |
| scancel: running, or waiting after a requeue | `test_cancelled_stays_away` |
| scancel in the grace | `test_cancelled_during_the_grace_stays_away` |
| `scancel -s USR2`, `-b`, `-f`; `--no-requeue` | test_training: `test_signals_of_the_user_…` |
| the requeue is refused | test_training: `test_a_refused_requeue_becomes_another_job` |
| no scontrol in the image | tests/container: `test_preempted_in_the_image` |
| kill -9 of a rank | test_training: `test_a_killed_rank`, `test_a_crash_at_the_same_step_…` |
| kill -STOP of a rank | test_watchdog: `test_a_stopped_rank` |
| a node that always fails its preflight | test_watchdog: `test_an_unfit_node` |
| a save slower than KillWait, rank 1 done early | `test_killed_in_the_middle_of_a_slow_save` |
| kill -9 of a node's slurmd, slurmstepd and tasks | test_nodes: `test_a_lost_node_costs_what_was_not_saved` |
| a node goes down, and its start fails when it is back | `test_a_node_that_is_down_and_then_fails_to_start_the_job` |
| kill -9 of the batch shell | `test_a_job_without_its_batch_shell_ends_and_is_resumed` |
| the same with a guard | test_guard: `test_a_guard_takes_over_where_the_batch_shell_was_killed` |
| one task of an array, whose number is the array's | test_training: `test_an_array_task_requeues_only_itself` |
| two jobs on one node that draw the same port | `test_two_jobs_that_draw_one_port_do_not_meet` |
| preempted after the last step | test_training: `test_preempted_after_the_last_step_is_finished` |
| all at random | test_chaos |
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc.reporting import run_status
from tests.cluster import slurm
from tests.cluster.kit import (
    SAVE_EVERY,
    Ended,
    Job,
    Kit,
    drives,
    finished_as,
    long,
    new_kit,
    resumed_exactly,
    stays_away,
)
from tests.cluster.test_training import drive_sbatch

pytestmark = pytest.mark.timeout(1200)

CONF = """
SlurmctldParameters=preempt_send_user_signal
ReturnToService=0
KillWait=90
Prolog={prolog}
"""
"""Of a cluster that is set up in another way. A script that was cancelled has time to say so, on a busy machine too; nodes
refuse to start jobs while there is a file `refuses-NODE`."""
PROLOG = """#!/bin/sh
[ ! -e {folder}/refuses-$SLURMD_NODENAME ]
"""


def status_of(kit: Kit, job: Job) -> dict[str, Any]:
    """What `gpt2hpc status --json` tells a user of the cluster."""
    (told,) = json.loads(kit._run([kit.python, "-m", "gpt2hpc.status", "--json", str(job.run.path)], {}))
    return dict(told)


# Killed -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Torn(Ended):
    """What lay in the directory of the save that was under way, by size, and which file was half written."""

    half: Path
    half_bytes: int
    sizes: dict[str, int]


def drive_killed_in_a_slow_save(kit: Kit) -> Torn:
    """The disk of rank 2 is slow, so that KillWait is over in the middle of the save that the preemption asks for."""
    with kit.nodes() as nodes:
        job = kit.sbatch("slow-save", "-p", "low0", "-w", nodes)
        kit.until_step(job, SAVE_EVERY + 3)
        kit.until_saved(job, SAVE_EVERY)
        (job.run.path / "rest-in-save").write_text(f"2 {10 * slurm.KILL_WAIT_S}")
        kit.preempt(nodes.split(",")[0])
        kit.until(job, lambda: kit.shown(job)["JobState"] == "PENDING", "the end of KillWait")
        half_bytes, half = (job.run.path / "rests-in-save").read_text().split(maxsplit=1)
        sizes = {path.name: path.stat().st_size for path in Path(half).parent.iterdir()}
        ended = kit.until_ended(job)
        return Torn(job, ended, half=Path(half), half_bytes=int(half_bytes), sizes=sizes)


@drives(drive_sbatch, drive_killed_in_a_slow_save)
def test_killed_in_the_middle_of_a_slow_save(driven: list[Any]) -> None:
    undisturbed, torn = driven
    first, second = torn.job.attempts
    assert torn.half.parent.suffix == ".tmp"
    assert torn.sizes[torn.half.name] == torn.half_bytes  # nobody finished it
    assert {"state-00001-of-00004.safetensors", "rank-00001.safetensors"} <= set(torn.sizes)  # rank 1 was done
    assert "rank-00002.safetensors" not in torn.sizes
    assert first["saved_step"] == second["first_step"] >= SAVE_EVERY
    assert "damaged checkpoint" not in torn.job.told()
    finished_as(torn, undisturbed, causes=[first["cause"], "finished"])
    assert first["cause"] in (None, "crashed")
    assert not torn.half.parent.exists()


def drive_batch_shell_killed(kit: Kit) -> list[Any]:
    """Nobody is left to say what comes next; then resume.sh submits the job again.

    Slurm tells the ranks to end, which then save. It also ends srun, by KILL with what else the shell had started or, where it comes
    to that first, by TERM, at which srun kills the ranks outright.
    """
    with kit.nodes() as nodes:
        first = kit.sbatch("batch-shell", "-w", nodes, "--mem=300M")
        kit.until_step(first, SAVE_EVERY + 5)
        kit.until_saved(first, SAVE_EVERY)
        os.kill(kit.cluster.batch_shell(first.number), signal.SIGKILL)
        ended = Ended(first, kit.until_ended(first))
        assert not kit.cluster.ranks(first.number)
        told = status_of(kit, first)
        number = kit._run(["bash", str(first.run.resume_script)], kit.variables).strip()
        again = replace(first, number=number, log=Path(str(first.log).replace(first.number, number)))
        return [ended, Ended(again, kit.until_ended(again)), told]


@drives(drive_sbatch, drive_batch_shell_killed)
def test_a_job_without_its_batch_shell_ends_and_is_resumed(driven: list[Any]) -> None:
    undisturbed, (killed, again, told) = driven
    assert (killed.slurm["JobState"], killed.slurm["Reason"]) == ("FAILED", "JobLaunchFailure")
    assert killed.slurm["Restarts"] == "0"
    assert "its batch script was killed" in told["detail"]
    assert again.slurm["MinMemoryNode"] == killed.slurm["MinMemoryNode"] == "300M"
    first, second = again.job.attempts
    finished_as(again, undisturbed, causes=[first["cause"], "finished"], restarts=0)
    assert second["first_step"] >= first["saved_step"] >= SAVE_EVERY  # one may be saved whose note was cut off
    assert first["cause"] in ("preempted", "crashed", None)
    if first["cause"] == "preempted":
        resumed_exactly(again)


# A cluster that is set up in another way ------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Signalled(Ended):
    signals: list[tuple[str, int]]
    preempted_at: str


@dataclass(kw_only=True)
class Held(Ended):
    """Slurm's reasons: why the job waits while a node is down, and why when the node could not start it; what status says then."""

    reasons: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)


@long
def drive_other_cluster(kit: Kit) -> dict[str, Future[Any]]:
    """A cluster of its own, with two pairs of nodes; what each of its drives returned, or what went wrong in it."""
    with tempfile.TemporaryDirectory(prefix="gpt2hpc-slurm-") as name, ThreadPoolExecutor() as pool:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "prolog").write_text(PROLOG.format(folder=folder))
        (folder / "prolog").chmod(0o755)
        conf = CONF.format(prolog=folder / "prolog")
        with slurm.running(folder / "slurm", nodes=4, conf=conf) as cluster:
            home = kit.folder / "other"
            home.mkdir()
            own = new_kit(cluster, home, pairs=2)
            calls: dict[str, Callable[[], Any]] = {
                "down": lambda: down_and_held(own, folder),
                "cancelled": lambda: cancelled(own),
                "grace": lambda: cancelled_in_the_grace(own),
                "low": lambda: preempted(own, "low"),
                "lowc": lambda: preempted(own, "lowc"),
                "one port": lambda: one_port(own),
            }
            futures = {name: pool.submit(call) for name, call in calls.items()}
            wait(futures.values())
            return futures


def cancelled(kit: Kit) -> list[Ended]:
    """One while it trains, one while it waits to go on: it has requeued itself after a signal."""
    with kit.nodes() as nodes:
        running, waiting = (kit.sbatch(f"cancelled-{name}", "-w", nodes) for name in ("running", "waiting"))
        kit.until_step(running, SAVE_EVERY + 5)
        kit.signal(running)
        kit.until_step(waiting, SAVE_EVERY + 5)
        kit.signal(waiting, "--signal=USR2")
        kit.until(waiting, lambda: kit.shown(waiting)["JobState"] == "PENDING", "the requeue")
        kit.signal(waiting)
        ended = [Ended(job, kit.until_ended(job)) for job in (running, waiting)]
    for job in ended:
        stays_away(job, kit)
    return ended


@drives(drive_other_cluster)
def test_cancelled_stays_away(driven: dict[str, Future[Any]]) -> None:
    """As the drive has seen; both have saved."""
    running, waiting = driven["cancelled"].result()
    assert [job.slurm["Restarts"] for job in (running, waiting)] == ["0", "1"]
    for job in (running, waiting):
        assert job.job.causes == ["preempted"]
        assert job.job.attempts[0]["saved_step"] == job.job.attempts[0]["last_step"] > SAVE_EVERY
    assert json.loads(running.job.run.decision.read_text())["action"] == "cancelled"
    assert run_status.read_status(running.job.run).state == "cancelled"


def cancelled_in_the_grace(kit: Kit) -> Ended:
    """Slow steps put off the agreement to stop, so that the cancel falls between the signal and the decision."""
    with kit.nodes() as nodes:
        job = kit.sbatch("cancelled", "-p", "low", "-w", nodes, env={"KIT_PACE_S": "3"})
        kit.until_step(job, 1)
        kit.preempt(nodes.split(",")[0])
        kit.until(job, lambda: kit.shown(job).get("PreemptTime", "None") != "None", "the preemption")
        kit.signal(job)
        ended = Ended(job, kit.until_ended(job))
    stays_away(ended, kit)
    return ended


@drives(drive_other_cluster)
def test_cancelled_during_the_grace_stays_away(driven: dict[str, Future[Any]]) -> None:
    job = driven["grace"].result()
    assert job.slurm["Restarts"] == "0"
    assert job.job.causes == ["preempted"]  # it saved, and would have been requeued
    assert json.loads(job.job.run.decision.read_text())["action"] == "cancelled"
    assert run_status.read_status(job.job.run).state == "cancelled"


def preempted(kit: Kit, partition: str) -> Signalled:
    signals = kit.folder / f"signals-{partition}"
    with kit.nodes() as nodes:
        job = kit.sbatch(partition, "-p", partition, "-w", nodes, env={"KIT_SIGNALS": str(signals)})
        kit.until_step(job, SAVE_EVERY + 5)
        kit.preempt(nodes.split(",")[1])
        kit.until(job, lambda: kit.shown(job).get("PreemptTime", "None") != "None", "the preemption")
        at = kit.shown(job)["PreemptTime"]
        ended = kit.until_ended(job)
    got = [(rank, int(number)) for rank, number in map(str.split, signals.read_text().splitlines())]
    return Signalled(job, ended, signals=got, preempted_at=at)


@drives(drive_sbatch, drive_other_cluster)
@pytest.mark.parametrize("partition", ["low", "lowc"])
def test_preempted_with_the_users_signal(driven: list[Any], partition: str) -> None:
    undisturbed, others = driven
    job = others[partition].result()
    assert set(job.signals) >= {(str(rank), int(signal.SIGUSR2)) for rank in range(4)}  # of the template's --signal
    finished_as(job, undisturbed, causes=["preempted", "finished"])
    resumed_exactly(job)


def down_and_held(kit: Kit, folder: Path) -> Held:
    """A node is declared down, and its prolog fails when it is back; then both are mended."""
    with kit.nodes() as nodes:
        node = nodes.split(",")[0]
        job = kit.sbatch("down", "-w", nodes)
        held = Held(job, {})
        kit.until_step(job, SAVE_EVERY + 5)
        kit.until_saved(job, SAVE_EVERY)
        held.at_step = job.step()
        refuses = folder / f"refuses-{node}"
        refuses.touch()
        kit.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=a test")
        waits_for(kit, held, "the wait for the node", but=("None", "BeginTime"))
        kit.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        waits_for(kit, held, "the failed start", but=(*held.reasons, "None", "BeginTime", "Resources", "Priority"))
        held.told = status_of(kit, job)
        refuses.unlink()
        kit.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        kit.cluster.run(*held.told["next"].split())
        held.slurm = kit.until_ended(job)
        return held


def waits_for(kit: Kit, held: Held, what: str, *, but: tuple[str, ...]) -> None:
    """Until the job waits for a reason that is none of these; the reason is kept."""

    def is_there() -> bool:
        shown = kit.shown(held.job)
        return shown["JobState"] == "PENDING" and shown["Reason"] not in but

    kit.until(held.job, is_there, what)
    held.reasons.append(kit.shown(held.job)["Reason"])


@drives(drive_sbatch, drive_other_cluster)
def test_a_node_that_is_down_and_then_fails_to_start_the_job(driven: list[Any]) -> None:
    undisturbed, others = driven
    job = others["down"].result()
    down, failed = job.reasons
    assert "Unavailable" in down
    assert failed == "launch_failed_requeued_held"
    assert (job.told["state"], job.told["next"]) == ("held", f"scontrol release {job.job.number}")
    first, second = job.job.attempts
    assert second["first_step"] == first["saved_step"] > job.at_step - SAVE_EVERY
    finished_as(job, undisturbed, causes=[first["cause"], "finished"], restarts=2)  # Slurm counts the failed start
    assert first["cause"] in (None, "preempted")


def one_port(kit: Kit) -> list[Ended]:
    """Two jobs that start at once on the same nodes, and whose numbers differ by as much as there are ports to draw from."""
    with kit.nodes() as nodes:
        flags = ["-w", nodes, "--hold"]
        first = kit.sbatch("port-1", *flags)
        conf = kit.cluster.directory / "slurm.conf"
        conf.write_text(re.sub(r"(?m)^FirstJobId=.*", f"FirstJobId={int(first.number) + 20_000}", conf.read_text()))
        kit.cluster.run("scontrol", "reconfigure")
        second = kit.sbatch("port-2", *flags)
        kit.cluster.run("scontrol", "release", f"{first.number},{second.number}")
        return [Ended(job, kit.until_ended(job)) for job in (first, second)]


@drives(drive_sbatch, drive_other_cluster)
def test_two_jobs_that_draw_one_port_do_not_meet(driven: list[Any]) -> None:
    undisturbed, others = driven
    first, second = others["one port"].result()
    assert int(second.job.number) - int(first.job.number) == 20_000
    assert first.slurm["NodeList"] == second.slurm["NodeList"]
    began, ended = (
        [datetime.fromisoformat(job.slurm[key]) for job in (first, second)] for key in ("StartTime", "EndTime")
    )
    assert max(began) < min(ended), "one was over before the other began"
    for job in (first, second):
        finished_as(job, undisturbed, causes=["finished"])
