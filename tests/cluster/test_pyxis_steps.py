"""How a script for pyxis asks Python, on the real Slurm: by a step of one task, where Slurm grants one.

pyxis itself is not there: its options are left out, and the Python of the ranks stands for the one in the image.
"""

from __future__ import annotations

import re

import pytest

from tests.cluster.kit import SAVE_EVERY, Ended, Kit, bytes_of, drives, resumed_exactly
from tests.cluster.test_training import drive_sbatch

pytestmark = pytest.mark.timeout(1200)


def preempted(kit: Kit, name: str, python: str) -> Ended:
    """A job whose host has that Python, and whose image has the one of all others."""
    whole = kit.template.read_text()
    without = re.sub(
        r"(?s)(    srun_python=\()[^\n]*container-image.*? python3\)", r'\1"$IMAGE_PYTHON")', whole, count=1
    )
    assert without != whole
    template = kit.folder / f"{name}.sbatch"
    template.write_text(without)
    variables = {
        "RUNTIME": "pyxis",
        "IMAGE": "/nowhere/image.sqsh",
        "IMAGE_PYTHON": kit.variables["PYTHON"],
        "PYTHON": python,
        "KIT_PACE_S": "0.3",  # it is to be preempted, however busy the machine
    }
    with kit.nodes() as nodes:
        job = kit.sbatch(name, "-p", "low", "-w", nodes, env=variables, template=template)
        kit.until_step(job, SAVE_EVERY + 5)
        kit.until_saved(job, SAVE_EVERY)
        at_step = job.step()
        kit.preempt(nodes.split(",")[1])
        return Ended(job, kit.until_ended(job), at_step)


def drive_host_with_gpt2hpc(kit: Kit) -> Ended:
    return preempted(kit, "pyxis-host", kit.variables["PYTHON"])


def drive_host_without(kit: Kit) -> Ended:
    return preempted(kit, "pyxis-alone", "/nowhere/python3")


@drives(drive_sbatch, drive_host_with_gpt2hpc)
def test_a_preempted_job_is_requeued_by_the_hosts_python(driven: list[Ended]) -> None:
    goes_on(*driven)
    # On a machine so busy that the ranks need all of the grace, Slurm is faster.
    assert re.search(r"gpt2hpc: job \d+: (requeue: |exit: requeued by somebody else)", driven[1].job.told())


@drives(drive_sbatch, drive_host_without)
def test_without_it_slurm_requeues_what_it_preempts(driven: list[Ended]) -> None:
    """And what comes after an undisturbed end is decided by a step, in the image."""
    goes_on(*driven)
    assert re.search(r"gpt2hpc: job \d+: exit: finished", driven[1].job.told())


def goes_on(undisturbed: Ended, job: Ended) -> None:
    assert job.slurm["JobState"] == "COMPLETED", job.job.told()
    assert job.job.causes == ["preempted", "finished"], job.job.told()
    assert bytes_of(job.job) == bytes_of(undisturbed.job)
    resumed_exactly(job)
    assert "cannot decide" not in job.job.told()
