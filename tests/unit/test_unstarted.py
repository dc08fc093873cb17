"""Jobs that wait, in squeue's words; tests/cluster asks a real one."""

from __future__ import annotations

import pytest

from gpt2hpc.cluster import queries, unstarted
from gpt2hpc.cluster.queries import Pending


def test_a_job_of_several_lines_hides_none_of_the_others() -> None:
    said = "7\ta\t/r/train.sbatch\n8\tof two\nlines\t/r/x.sh\n9\tb\t/r/y.sh --text one\ntwo\n10\t\t(null)\n"
    assert queries.pending_in(said) == [
        Pending("7", "a", "/r/train.sbatch"),
        Pending("9", "b", "/r/y.sh --text one"),
        Pending("10", "", "(null)"),
    ]
    assert queries.pending_in("") == []


@pytest.mark.parametrize(
    ("command", "is_known"),
    [
        ("/r/slurm/job.sh", True),
        ("/r/slurm/job.sh --seed 2", True),
        ("/r/slurm/job.sh.old", False),
        ("/r/slurm/train_124m.sbatch", False),
    ],
)
def test_what_resume_submits_is_known_whatever_its_arguments(command: str, *, is_known: bool) -> None:
    assert bool(unstarted.RESUBMITTED.search(command)) is is_known
