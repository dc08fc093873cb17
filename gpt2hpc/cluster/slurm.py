"""What Slurm says of a job, from the text of `scontrol show job -o`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2hpc.errors import UsageError


@dataclass(frozen=True)
class Job:
    """A job at the moment its attempt ended.

    Args:
        job: `J`, or `A_a` for an array task: what `scontrol requeue` must be given.
        restart: SLURM_RESTART_COUNT of the attempt that ended.
        state: Slurm's JobState.
        restarts: Slurm's count; above `restart` when somebody else requeued the job already.
        exit_code: Of srun or of the ranks; None where unknown.
        nodes: The nodes it ran on.
        cancelled: The user wants no more of it.
        may_requeue: False for `--no-requeue`: `scontrol update requeue=1` must come before a requeue.
        preempted: A job of higher priority has asked for its nodes; the grace runs.
        refused: `scontrol requeue` was tried and refused.
        excluded: Nodes that the user, or an earlier decision, has excluded.
        required: Nodes that the user insists on.
        succeeds: Jobs that this one continues since their requeue was refused, the newest first.
        died_on: The node whose rank ended first, in a crash.
    """

    job: str
    restart: int
    state: str = "RUNNING"
    restarts: int = 0
    exit_code: int | None = None
    nodes: str = ""
    cancelled: bool = False
    may_requeue: bool = True
    preempted: bool = False
    refused: bool = False
    excluded: str = ""
    required: str = ""
    succeeds: tuple[str, ...] = ()
    died_on: str = ""


def parse_show_job(
    text: str,
    *,
    restart: int,
    exit_code: int | None,
    refused: bool = False,
    succeeds: Sequence[str] = (),
    died_on: str = "",
) -> Job:
    """The first job in the output of `scontrol show job -o`; UsageError where it is not that."""
    facts = show_job_facts(text)
    if "JobState" not in facts:
        raise UsageError("standard input is not the output of `scontrol show job -o`; pipe that into this command")
    array, task = facts.get("ArrayJobId"), facts.get("ArrayTaskId")
    return Job(
        job=f"{array}_{task}" if array and task else facts["JobId"],
        restart=restart,
        state=facts["JobState"],
        restarts=int(facts.get("Restarts", 0)),
        exit_code=exit_code,
        nodes=_none_as_empty(facts.get("NodeList", "")),
        may_requeue=facts.get("Requeue", "1") != "0",
        preempted=_none_as_empty(facts.get("PreemptTime", "")) not in ("", "Unknown"),
        refused=refused,
        excluded=_none_as_empty(facts.get("ExcNodeList", "")),
        required=_none_as_empty(facts.get("ReqNodeList", "")),
        succeeds=tuple(succeeds),
        died_on=died_on,
    )


def show_job_facts(text: str) -> dict[str, str]:
    """The first job in the output of `scontrol show job -o`, by key; empty where it is not that."""
    line = text.splitlines()[0] if text.strip() else ""
    facts = dict(re.findall(r"(\w+)=(\S*)", line.partition(" Command=")[0]))  # then come the user's own words
    return facts if "JobId" in facts else {}


def expand_nodes(nodes: str) -> list[str]:
    """`gpu[01-03,7],login` as its names; a list in Slurm's notation with one bracket a name."""
    names = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)] if last else [first]
            names += [f"{prefix}{number}{suffix}" for number in numbers]
    return names


def minutes(text: str) -> int:
    """Whole minutes of a time limit, rounded up as Slurm does."""
    return math.ceil(exact_minutes(text))


def exact_minutes(text: str) -> float:
    """Of a time as sbatch reads it: `90`, `90:00`, `1:30:00`, `1-12`, `1-12:30`, `1-12:30:00`; and `0.5`."""
    if re.fullmatch(r"\d+\.?\d*|\.\d+", text.strip()):
        return float(text)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise UsageError(f"--time={text} is not a time; write minutes, HH:MM:SS or DAYS-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    elif match[4] is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    return seconds / 60


def seconds(text: str) -> int | None:
    """A length of time as Slurm prints it: `30`, `30 sec`, `1:30`, `1:30:00`, `2-01:00:00`; None for UNLIMITED and what is none."""
    match = re.fullmatch(r"(?:(?:(?:(\d+)-)?(\d+):)?(\d+):)?(\d+)(?: sec)?", text)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _none_as_empty(text: str) -> str:
    return "" if text in ("(null)", "None") else text
