"""Jobs of one kind of task for Slurm, packed by submitit: an array of them, or a single one that waits for other jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2hpc.cluster import inventory, mounts, script
from gpt2hpc.cluster.batch import (
    as_from_a_login_shell,
    new_executor,
    refusals_explained,
    set_up_lines,
    srun_arguments,
    switches,
    waiting,
)
from gpt2hpc.cluster.site_profile import Site

SIGNAL_S = 30


@dataclass(frozen=True)
class ArrayJob:
    """What is asked of Slurm, for each task.

    Args:
        folder: For scripts, logs and pickles; every node must see it there.
        name: The job's name.
        cpus: CPU cores of a rank; None for Slurm's own default.
        minutes: Time limit of a task; None for the partition's default.
        options: Further options of sbatch by their long names.
        site: The cluster's ways.
        image: Container image, or None.
        variables: What the blocks of the script read, such as OUT.
        binds: Files and directories to be seen in the container, beside those of the variables.
        block: Which blocks of `script` are around a task: prepare or evaluate.
        ranks: Ranks of a task, all on one node.
        gpus: GPUs of a task.
    """

    folder: Path
    name: str
    cpus: int | None
    minutes: int | None
    options: dict[str, Any]
    site: Site
    image: str | None
    variables: Mapping[str, str]
    binds: tuple[str, ...] = ()
    block: str = "prepare"
    ranks: int = 1
    gpus: int = 0

    def set_up(self) -> list[str]:
        site = self.site
        if self.image and self.binds:  # each by a bind of its own
            site = dataclasses.replace(site, binds=(*site.binds, *self.binds))
        return set_up_lines(f"{self.block} set-up", {**self.variables, "PICKLES": str(self.folder)}, site, self.image)

    def mounts(self) -> list[str]:
        """What of the host the container sees, for a dry run."""
        named = [(path, name) for name, path in self.variables.items() if path]
        named += [(path, "--source") for path in self.binds]
        return mounts.described(self.site, self.image, named, gpus=self.gpus > 0)

    def parameters(self, at_once: int, dependency: str | None = None) -> dict[str, Any]:
        """What submitit makes a script from; a job whose dependency can never be met is cancelled rather than left to wait."""
        more: dict[str, Any] = {"requeue": True, "open-mode": "append", **switches(self.options)}
        if dependency is not None:
            more |= waiting(dependency)
        return {
            "job_name": self.name,
            "nodes": 1,
            "ntasks_per_node": self.ranks,
            **self.site.gpu_request(self.gpus),
            "cpus_per_task": self.cpus,
            "time": self.minutes,
            "signal_delay_s": SIGNAL_S,
            "array_parallelism": at_once,
            "wckey": None,
            "stderr_to_stdout": True,
            "additional_parameters": more,
            "srun_args": srun_arguments(self.site),
            "setup": self.set_up(),
            "teardown": script.lines(f"{self.block} tear-down"),
        }

    def text(self) -> str:
        """The batch script of a single task, as a dry run shows it."""
        executor = new_executor(self.folder, self.parameters(1))
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self, tasks: Sequence[Callable[[], int]], *, at_once: int) -> list[str]:
        """Hand the tasks to Slurm, as many arrays as its MaxArraySize makes necessary; returns the arrays' numbers."""
        size = inventory.max_array_size()
        groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        numbers = []
        parameters = self.parameters(max(1, at_once // len(groups)))
        with refusals_explained(), as_from_a_login_shell(parameters):
            for group in groups:
                executor = new_executor(self.folder, parameters)
                with executor.batch():
                    jobs = [executor.submit(task) for task in group]
                numbers.append(jobs[0].job_id.partition("_")[0])
        return numbers

    def submit_after(self, task: Callable[[], int], dependency: str | None) -> str:
        """A single job for when that dependency, in sbatch's words, is met, or at once; returns its number."""
        parameters = self.parameters(1, dependency)
        with refusals_explained(), as_from_a_login_shell(parameters):
            return new_executor(self.folder, parameters).submit(task).job_id
