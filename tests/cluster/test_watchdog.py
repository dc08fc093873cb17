"""Bad nodes on the real Slurm: one that goes silent, and one that is not fit for the job."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from gpt2hpc.cluster.slurm import expand_nodes
from tests.cluster.kit import SAVE_EVERY, Ended, Kit, drives, finished_as, long
from tests.cluster.test_training import drive_sbatch

pytestmark = pytest.mark.timeout(1200)


@long
def drive_stopped_rank(kit: Kit) -> Ended:
    """kill -STOP: it neither ends nor answers, as when its node hangs."""
    settings = replace(kit.settings(), requeue=replace(kit.settings().requeue, hang_minutes=0.15))
    with kit.nodes() as nodes:
        job = kit.sbatch("stopped-rank", "-w", nodes, settings=settings)
        kit.until_step(job, SAVE_EVERY + 5)
        kit.until_saved(job, SAVE_EVERY)
        os.kill(kit.cluster.ranks(job.number)[3], signal.SIGSTOP)
        return Ended(job, kit.until_ended(job, seconds=500))


@drives(drive_sbatch, drive_stopped_rank)
def test_a_stopped_rank(driven: list[Ended]) -> None:
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["crashed", "finished"])
    first, second = job.job.attempts
    assert second["first_step"] == first["saved_step"] >= SAVE_EVERY
    assert len(first["suspects"]) == 1
    told = job.job.told()
    assert f"stacks of 3 ranks in {job.job.run.dumps_of(1)}; none of rank 3 on {first['suspects'][0]}" in told
    assert "crash 1 of 3 allowed" in told
    found = sorted(job.job.run.dumps_of(1).glob("rank*.txt"))
    assert [path.name for path in found] == ["rank0.txt", "rank1.txt", "rank2.txt"]
    for path in found:  # by where the fourth was stopped, they wait for its gradients or for another word of it
        assert "in _one_step" in path.read_text(), path.read_text()


@long
def drive_unfit_node(kit: Kit) -> Ended:
    """Of four nodes, two of which it needs, the second never sees the run directory."""
    with kit.nodes() as some, kit.nodes() as more:
        mine = sorted([*some.split(","), *more.split(",")])
        job = kit.sbatch("unfit-node", "--hold", f"--exclude={kit.others(mine)}", env={"KIT_OTHER_DISK": mine[1]})
        kit.release_on(job, mine)
        return Ended(job, kit.until_ended(job, seconds=500))


@drives(drive_sbatch, drive_unfit_node)
def test_an_unfit_node(driven: list[Ended]) -> None:
    """The job starts again without it, and no step is taken with it."""
    undisturbed, job = driven
    finished_as(job, undisturbed, causes=["crashed", "finished"])
    first, second = job.job.attempts
    (unfit,) = first["suspects"]
    assert unfit not in expand_nodes(second["nodes"])
    assert unfit in expand_nodes(job.slurm["ExcNodeList"])
    assert (first["first_step"], first["saved_step"], second["first_step"]) == (0, 0, 0)
    told = job.job.told()
    assert f"preflight: --run-dir={job.job.run.path} is not shared by all nodes ({unfit}: what it writes" in told
    assert "preflight: 2 nodes × 2 ranks on cpu, all-reduce " in told
