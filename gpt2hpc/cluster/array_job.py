"""Array jobs for Slurm, packed by submitit: many tasks of one kind, and a job that waits for them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2hpc.cluster import mounts, queries, script
from gpt2hpc.cluster.batch import new_executor, refusals_explained, set_up_lines, srun_arguments, switches
from gpt2hpc.cluster.site_profile import Site

SIGNAL_S = 30


@dataclass(frozen=True)
class ArrayJob:
    """What is asked of Slurm, for each task.

    Args:
        folder: For scripts, logs and pickles; every node must see it there.
        name: The job's name.
        cpus: CPU cores of a task.
        minutes: Time limit of a task; None for the partition's default.
        options: Further options of sbatch by their long names.
        site: The cluster's ways.
        image: Container image, or None.
        out: What the tasks write.
        sources: Files and directories that they read.
    """

    folder: Path
    name: str
    cpus: int
    minutes: int | None
    options: dict[str, Any]
    site: Site
    image: str | None
    out: str
    sources: tuple[str, ...]

    def set_up(self) -> list[str]:
        site = self.site
        if self.image and self.sources:  # each by a bind of its own
            site = dataclasses.replace(site, binds=(*site.binds, *self.sources))
        return set_up_lines("prepare set-up", {"OUT": self.out, "PICKLES": str(self.folder)}, site, self.image)

    def mounts(self) -> list[str]:
        """What of the host the container sees, for a dry run."""
        named = [(self.out, "--out"), *((path, "--source") for path in self.sources)]
        return mounts.described(self.site, self.image, named, gpus=False)

    def parameters(self, at_once: int, after: Sequence[str] = ()) -> dict[str, Any]:
        """What submitit makes a script from; `after` are jobs that must have ended, in whatever way."""
        more: dict[str, Any] = {"requeue": True, "open-mode": "append", **switches(self.options)}
        if after:
            more["dependency"] = f"afterany:{':'.join(after)}"
        return {
            "job_name": self.name,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus,
            "time": self.minutes,
            "signal_delay_s": SIGNAL_S,
            "array_parallelism": at_once,
            "wckey": None,
            "stderr_to_stdout": True,
            "additional_parameters": more,
            "srun_args": srun_arguments(self.site),
            "setup": self.set_up(),
            "teardown": script.lines("prepare tear-down"),
        }

    def text(self) -> str:
        """The batch script of a single task, as a dry run shows it."""
        executor = new_executor(self.folder, self.parameters(1))
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self, tasks: Sequence[Callable[[], int]], *, at_once: int) -> list[str]:
        """Hand the tasks to Slurm, as many arrays as its MaxArraySize makes necessary; returns the arrays' numbers."""
        size = queries.max_array_size()
        groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        numbers = []
        with refusals_explained():
            for group in groups:
                executor = new_executor(self.folder, self.parameters(max(1, at_once // len(groups))))
                with executor.batch():
                    jobs = [executor.submit(task) for task in group]
                numbers.append(jobs[0].job_id.partition("_")[0])
        return numbers

    def submit_after(self, task: Callable[[], int], after: Sequence[str]) -> str:
        """A single job for when the arrays have ended."""
        with refusals_explained():
            return new_executor(self.folder, self.parameters(1, after)).submit(task).job_id
