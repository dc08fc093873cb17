"""A process's place in its job, read from the environment once.

Ours and torchrun's variables come first, then those of a Slurm step; without either the process is alone.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from gpt2hpc.errors import UsageError

JOB, RESTART = "GPT2HPC_JOB", "GPT2HPC_RESTART"
JOB_END, RENDEZVOUS = "GPT2HPC_JOB_END", "GPT2HPC_RENDEZVOUS"
LAUNCHER_PID, GPUS_ALLOTTED = "GPT2HPC_LAUNCHER_PID", "GPT2HPC_GPUS_ALLOTTED"
LOCAL = "local-"
"""How the names of jobs begin that are no batch jobs."""
SRUN = "GPT2HPC_SRUN"
"""Set by our batch scripts: a task of srun is a rank, even a single one. A person's shell in a step of one task is none."""

SUBMITTED_VERSION = "GPT2HPC_SUBMITTED_VERSION"
"""Of the gpt2hpc that wrote the batch script; the ranks compare it with their own."""
MIN_ALLREDUCE = "GPT2HPC_MIN_ALLREDUCE_GB_S"
"""Of the site: what train.min_allreduce_gb_s is between GPUs of several nodes, unless that is set."""


@dataclass(frozen=True)
class DistEnv:
    """Ranks, job and rendezvous of this process.

    Args:
        job: The job's name for the ledger: `J`, or `A_a` for an array task.
        restart: How often the job was restarted before.
        job_end: Unix time at which the job will be killed, where known.
        rendezvous: A file on this machine to meet at, instead of master_addr and master_port.
        launcher_pid: The local launcher; when it dies, so should its ranks.
        is_launched: Whether something (torchrun, srun, our launcher) started this process as one of the ranks.
        gpus_allotted: Whether the job was given GPUs, so that training on the CPU would be a mistake.
        nodes: Slurm's list of nodes, or this host.
        gpus_on_node: How many of them on this node, where Slurm tells.
        gpus_shown: How many CUDA_VISIBLE_DEVICES lists; None where it is not set, and all are shown.
        node: This one's name, by which Slurm knows it.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    job: str
    restart: int
    nodes: str
    master_addr: str | None = None
    master_port: int | None = None
    rendezvous: str | None = None
    job_end: float | None = None
    launcher_pid: int | None = None
    is_launched: bool = False
    gpus_allotted: bool = False
    gpus_on_node: int | None = None
    gpus_shown: int | None = None
    node: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> DistEnv:
        """Raises UsageError, naming the variable, for one that is not a number."""
        names = ("", "", "")
        local_world_size = None
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
            local_world_size = _integer(env, "LOCAL_WORLD_SIZE", 0) or None
        elif "SLURM_STEP_ID" in env and (SRUN in env or _integer(env, "SLURM_STEP_NUM_TASKS", 1) > 1):
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
            local_world_size = _tasks_here(env)
        rank, world_size = _integer(env, names[0], 0), _integer(env, names[2], 1)
        return cls(
            rank=rank,
            local_rank=_integer(env, names[1], rank),
            world_size=world_size,
            local_world_size=local_world_size or world_size,
            is_launched=bool(names[0]),
            job=job_name(env),
            restart=_integer(env, "SLURM_RESTART_COUNT", 0)
            if "SLURM_JOB_ID" in env and JOB not in env
            else _integer(env, RESTART, 0),
            nodes=env.get("SLURM_JOB_NODELIST", socket.gethostname()),
            node=env.get("SLURMD_NODENAME") or socket.gethostname(),
            master_addr=env.get("MASTER_ADDR"),
            master_port=_integer(env, "MASTER_PORT", 0) or None,
            rendezvous=env.get(RENDEZVOUS),
            job_end=float(env[JOB_END]) if JOB_END in env else None,
            launcher_pid=_integer(env, LAUNCHER_PID, 0) or None,
            gpus_on_node=_integer(env, "SLURM_GPUS_ON_NODE", 0) or None,
            gpus_shown=_listed(env["CUDA_VISIBLE_DEVICES"]) if "CUDA_VISIBLE_DEVICES" in env else None,
            gpus_allotted=are_gpus_allotted(env),
        )


def are_gpus_allotted(env: Mapping[str, str]) -> bool:
    """Whether something, Slurm or our launcher, has given this process GPUs."""
    lists, counts = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"), (GPUS_ALLOTTED, "SLURM_GPUS_ON_NODE")
    return any(env.get(name) for name in lists) or any(env.get(name, "") not in ("", "0") for name in counts)


def is_in_image(env: Mapping[str, str]) -> bool:
    """Whether this process runs in an image of Apptainer's or Singularity's."""
    return any(name in env for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"))


def job_name(env: Mapping[str, str]) -> str:
    """Ours, Slurm's (`A_a` for an array task, whose JOB_ID may equal the array's), or this process."""
    if JOB in env:
        return env[JOB]
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID") or new_local_job()


def new_local_job() -> str:
    """A name for a job of this machine, unlike any other: pids alone repeat, in containers at once."""
    return f"{LOCAL}{socket.gethostname()}-{datetime.now(UTC):%Y%m%d%H%M%S}-{os.getpid()}"


def _tasks_here(env: Mapping[str, str]) -> int | None:
    """Tasks of the step on this node, from `4(x2),3`; None where Slurm does not tell."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    nodes = [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]
    node = _integer(env, "SLURM_NODEID", 0)
    return nodes[node] if node < len(nodes) else None


def _listed(devices: str) -> int:
    """Of CUDA_VISIBLE_DEVICES: a GPU behind an invalid one, as "-1", is not shown (CUDA C++ Programming Guide)."""
    names = (name.strip() for name in devices.split(","))
    return sum(1 for _ in itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "")
    if not value:
        return default
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{name}={value} in the environment must be a whole number; unset it or mend it") from None
