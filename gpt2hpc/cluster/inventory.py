"""What a cluster has to give, asked of Slurm: its settings, partitions, accounts and QOS, and whether it would take a job.

Nothing here raises for a Slurm that is not there, does not answer or keeps no accounts: the answer is then None, or empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt2hpc.cluster import queries

MAX_ARRAY_SIZE = 1001
"""Slurm's own default."""


@dataclass(frozen=True)
class Partition:
    """Nodes of one kind in a partition, as sinfo tells: `gpus` of a node, times as sbatch reads them.

    `default_time` is for a job that names none; None where that gets the limit.
    """

    name: str
    is_default: bool
    time_limit: str
    nodes: int
    cpus: int
    gpus: int
    gres: str
    features: str
    default_time: str | None = None


@dataclass(frozen=True)
class Association:
    """A right to submit: an account, for one partition or (empty) for all, with these QOS."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


def settings() -> dict[str, str]:
    """`scontrol show config`, by name."""
    return settings_or_silence()[0]


def settings_or_silence() -> tuple[dict[str, str], str | None]:
    """The settings; without any, why Slurm's controller does not answer."""
    said, failure = queries.asked("scontrol", "show", "config")
    if failure is not None:
        return {}, last_cause(failure)
    return dict(re.findall(r"(?m)^(\S+)\s*= (.*?)\s*$", said)), None


def last_cause(said: str) -> str:
    """Of the lines that a program of Slurm says as it gives up, the last: those before lead to it."""
    return re.sub(r"^\w+: (error|fatal): ", "", said.splitlines()[-1].strip()) if said.strip() else said


def partition_settings() -> dict[str, dict[str, str]]:
    """`scontrol show partition`, by the partition's name and by key; empty without a Slurm."""
    said = queries.ask("scontrol", "show", "partition", "-o", "--all") or ""
    rows = [dict(word.partition("=")[::2] for word in line.split() if "=" in word) for line in said.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def qualities() -> dict[str, dict[str, str]]:
    """QOS of the accounts, by name: PreemptMode and GraceTime as sacctmgr writes them; empty without accounts."""
    columns = ("Name", "PreemptMode", "GraceTime")
    said = queries.ask("sacctmgr", "-n", "-P", "show", "qos", f"format={','.join(columns)}") or ""
    rows = [dict(zip(columns, line.split("|"), strict=False)) for line in said.splitlines()]
    return {row["Name"]: row for row in rows if len(row) == len(columns)}


def refusal(options: Mapping[str, Any]) -> str | None:
    """Slurm's words where it would not take a batch job with these options of sbatch; None where it would. Submits nothing."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    _, said = queries.asked("sbatch", "--test-only", *flags, "--wrap=true")
    if said is None:
        return None
    lines = (re.sub(r"^(sbatch: )?(error: |fatal: )?(allocation failure: )?", "", line) for line in said.splitlines())
    return "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))


def associations(user: str) -> list[Association] | None:
    """What this user may submit under; None where Slurm keeps no accounts, or does not tell."""
    said = queries.ask(
        "sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=Account,Partition,QOS,DefaultQOS"
    )
    return None if said is None else associations_in(said)


def associations_in(said: str) -> list[Association]:
    """Out of sacctmgr's lines `account|partition|qos,qos|default`."""
    rows = [line.split("|") for line in said.splitlines()]
    return [
        Association(account, partition, tuple(name for name in qos.split(",") if name), default)
        for account, partition, qos, default in (row for row in rows if len(row) == 4)
    ]


def default_account(user: str) -> str | None:
    """The account that Slurm takes where none is named."""
    return (queries.ask("sacctmgr", "-n", "-P", "show", "user", user, "format=DefaultAccount") or "").strip() or None


def first_node() -> str | None:
    """The name of a node, as its neighbours may have it."""
    return next(iter((queries.ask("sinfo", "-h", "-N", "-o", "%N") or "").split()), None)


def partitions() -> list[Partition] | None:
    """What sinfo tells, a row for each partition and kind of node; None without a Slurm."""
    said = queries.ask("sinfo", "-h", "-e", "-o", "%P\t%l\t%D\t%c\t%G\t%f\t%L")
    if said is None:
        return None
    found = []
    for line in said.splitlines():
        name, limit, nodes, cpus, gres, features, default_time = line.split("\t")
        found.append(
            Partition(
                name=name.rstrip("*"),
                is_default=name.endswith("*"),
                time_limit=limit,
                nodes=int(nodes),
                cpus=int(cpus.rstrip("+")),
                gpus=sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()\s]+:)?(\d+)", gres)),
                gres="" if gres == "(null)" else gres,
                features="" if features == "(null)" else features,
                default_time=None if default_time in ("n/a", limit) else default_time,
            )
        )
    return found


def gpus_of(partition: str | None) -> int | None:
    """GPUs on the nodes that have most, of this partition or the default one; None without a Slurm.

    Of several, `a,b`, Slurm takes any: the fewest of those that have GPUs at all.
    """
    found = partitions()
    if found is None:
        return None
    names = partition.split(",") if partition else [each.name for each in found if each.is_default]
    most = [max((each.gpus for each in found if each.name == name), default=0) for name in names]
    return min((gpus for gpus in most if gpus), default=0)


def max_array_size() -> int:
    """The most tasks that this cluster takes in one array."""
    size = settings().get("MaxArraySize", "")
    return max(1, int(size)) if size.isdecimal() else MAX_ARRAY_SIZE
