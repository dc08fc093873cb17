"""Nodes that go away under a job."""

from __future__ import annotations

import pytest

from tests.cluster.kit import SAVE_EVERY, Ended, Kit, bytes_of, drives, logged_once, long
from tests.cluster.test_training import drive_sbatch

pytestmark = pytest.mark.timeout(1200)


def lost(kit: Kit, name: str, which: int) -> Ended:
    with kit.nodes() as nodes:
        node = nodes.split(",")[which]
        job = kit.sbatch(name, "-w", nodes)
        kit.until_step(job, SAVE_EVERY + 5)
        kit.until_saved(job, SAVE_EVERY)
        kit.cluster.lose(node)
        kit.until(job, lambda: kit.shown(job)["Restarts"] != "0", f"the restart after {node} was lost", seconds=180)
        kit.cluster.bring_back(node)
        return Ended(job, kit.until_ended(job))


@long
def drive_first_node_lost(kit: Kit) -> Ended:
    """With the batch shell: nobody is left to say what comes next."""
    return lost(kit, "first-node-lost", 0)


@long
def drive_second_node_lost(kit: Kit) -> Ended:
    return lost(kit, "second-node-lost", 1)


@drives(drive_sbatch, drive_first_node_lost, drive_second_node_lost)
def test_a_lost_node_costs_what_was_not_saved(driven: list[Ended]) -> None:
    undisturbed, *both = driven
    for job in both:
        assert (job.slurm["JobState"], job.slurm["ExitCode"]) == ("COMPLETED", "0:0"), job.job.told()
        first, *later = job.job.attempts
        begun = next(attempt for attempt in later if attempt["first_step"])
        assert first["cause"] in (None, "crashed")
        assert first["saved_step"] == begun["first_step"] >= SAVE_EVERY
        # A node that comes back may still be told to end the job of this number, which ends the restarted one too.
        assert set(job.job.causes[1:-1]) <= {"preempted", "crashed"}
        assert len(later) <= 2
        assert job.job.causes[-1] == "finished"
        assert bytes_of(job.job) == bytes_of(undisturbed.job)
        logged_once(job.job)
