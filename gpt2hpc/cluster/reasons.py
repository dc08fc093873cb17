"""Slurm's words for why a job waits and how it ended, in a reader's words; `man squeue`, JOB REASON CODES and JOB STATE CODES."""

from __future__ import annotations

import re

WAITS = {
    "Priority": "jobs of higher priority come first",
    "Resources": "it is next, once enough nodes are free",
    "BeginTime": "it may not start before its begin time, as after a requeue",
    "Dependency": "a job that it depends on has not ended",
    "DependencyNeverSatisfied": "the job that it depends on ended otherwise than asked for, so it never starts",
    "JobArrayTaskLimit": "as many tasks of its array run as are allowed to at once",
    "Licenses": "a licence that it asks for is in use",
    "Prolog": "its nodes are being made ready",
    "None": "Slurm has not looked at it yet",
    "Cleaning": "its last start is being cleaned up",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation was deleted",
    "NodeDown": "a node that it asks for is down",
    "ReqNodeNotAvail": "a node that it asks for is down, drained or reserved",
    "PartitionDown": "its partition takes jobs, but starts none",
    "PartitionInactive": "its partition starts no jobs now",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows",
    "PartitionTimeLimit": "it asks for more time than its partition allows",
    "PartitionConfig": "its partition does not allow what it asks for",
    "AccountNotAllowed": "its partition does not take this account",
    "QOSNotAllowed": "its partition does not take this QOS",
    "BadConstraints": "no node is what it asks for",
    "InvalidAccount": "Slurm does not know its account",
    "InvalidQOS": "Slurm does not know its QOS",
    "JobHeldUser": "held by its owner",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held: Slurm has requeued it too often, as by failing batch starts",
    "launch failed requeued held": "held: Slurm could not start it on its node, and requeued it",
}
"""Reasons of jobs in the state PENDING."""

ENDS = {
    "BOOT_FAIL": "its node did not boot",
    "CANCELLED": "cancelled",
    "COMPLETED": "its script ended with exit code 0",
    "DEADLINE": "its deadline passed",
    "FAILED": "its script ended with an error",
    "NODE_FAIL": "a node of it failed",
    "OUT_OF_MEMORY": "killed for memory: ask for more (--mem), or lower train.micro_batch_size",
    "PREEMPTED": "preempted, and not requeued",
    "REVOKED": "taken back by another cluster",
    "TIMEOUT": "killed at its time limit",
}
"""States of jobs that are over."""

_LIMITED = {
    "MaxJobs": "as many jobs run as are allowed at once",
    "MaxSubmit": "as many jobs are submitted as are allowed",
    "GrpJobs": "as many jobs run as are allowed at once, together",
    "GrpSubmit": "as many jobs are submitted as are allowed, together",
    "MaxWall": "it asks for more time than is allowed",
    "GrpWall": "the time that is allowed is used up",
    "Minutes": "the compute time that is allowed is used up, or would be",
    "GRES": "as many GPUs are in use as are allowed",
    "Gres": "as many GPUs are in use as are allowed",
    "Node": "as many nodes are in use as are allowed",
    "Cpu": "as many cores are in use as are allowed",
    "CPU": "as many cores are in use as are allowed",
    "Mem": "as much memory is in use as is allowed",
    "Min": "it asks for less than must be asked for",
}
"""What a limit of an account (Assoc…) or a QOS is on; the first that is in the name."""

_MAX = re.compile(r"(QOS|Assoc)\w*?(Max|Grp|Min)\w+")
_WHOSE = {"QOS": "of its QOS", "Assoc": "of its account"}
_UNMENDED = ("JobHeldAdmin",)
_HELD = ("JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue")
_STUCK = ("DependencyNeverSatisfied", "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints")


def is_held(reason: str) -> bool:
    """Whether it waits for a `scontrol release`."""
    return key(reason) in _HELD or "held" in reason.lower()


def key(reason: str) -> str:
    """Its first word, where more follows: `ReqNodeNotAvail, UnavailableNodes:n1`; `launch failed …` stays whole."""
    return (
        re.split(r"[,(]", reason.strip("()"))[0]
        .strip()
        .replace("launch_failed_requeued_held", "launch failed requeued held")
    )


def waits(reason: str) -> str:
    """Why a job waits, as `Priority: jobs of higher priority come first`; a reason that is not known is shown as it is."""
    short = key(reason)
    if (words := WAITS.get(short) or _limit(short)) is None:
        return reason
    detail = reason.partition(",")[2].strip()
    return f"{short}: {words}" + (f" ({detail})" if detail else "")


def _limit(short: str) -> str | None:
    found = _MAX.match(short)
    what = next((words for name, words in _LIMITED.items() if name in short), None)
    if found is None or what is None:
        return None
    user = ", for each user" if short.endswith(("PerUser", "PerUserLimit")) else ""
    return f"{what} by a limit {_WHOSE[found[1]]}{user}"


def mend(reason: str, job: str) -> str:
    """The command that helps, if there is one for its owner."""
    if is_held(reason):
        return "" if key(reason) in _UNMENDED else f"scontrol release {job}"
    return f"scontrol show job {job}" if key(reason) in _STUCK else ""


def ended(state: str, reason: str = "", exit_code: str = "", by: str = "") -> str:
    """How a job ended: `NODE_FAIL: a node of it failed`; `by` is who cancelled it, `exit_code` Slurm's CODE:SIGNAL."""
    if key(reason) == "JobLaunchFailure":
        return f"{state} (JobLaunchFailure): its batch script was killed, or could not be started"
    words = ENDS.get(state)
    if words is None:
        return state
    code, _, number = exit_code.partition(":")
    if state == "CANCELLED" and by:
        words = f"cancelled by {by}"
    elif state == "FAILED" and (code not in ("", "0") or number not in ("", "0")):
        words = (
            f"its script ended with exit code {code}" if number in ("", "0") else f"its script died of signal {number}"
        )
    return f"{state}: {words}"
