"""What Slurm knows of jobs, asked of its own programs: its queue and its accounts; what a cluster has, `inventory` asks.

Nothing here raises for a Slurm that is not there, does not answer or keeps no accounts: the answer is then None, or empty.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc.cluster import reasons
from gpt2hpc.cluster.slurm import show_job_facts

PATIENCE_S = 30.0

_QUEUE = {
    "number": "%i",
    "state": "%T",
    "reason": "%r",
    "start": "%S",
    "nodes": "%N",
    "left": "%L",
    "partition": "%P",
    "limit": "%l",
    "excluded": "%x",
}
_ACCOUNTS = {
    "number": "JobID",
    "state": "State",
    "exit_code": "ExitCode",
    "ended": "End",
    "nodes": "NodeList",
    "limit": "Timelimit",
}
OVER = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
)
"""States of jobs that neither wait nor run."""
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT")
"""Those of jobs that were requeued, and wait for a `scontrol release`."""
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", *HELD)


@dataclass(frozen=True)
class Queued:
    """A job in squeue: `number` is `J` or `A_a`; `start` is Slurm's own guess, or when it began; `limit` as sbatch reads it."""

    number: str
    state: str
    reason: str
    start: str
    nodes: str
    left: str
    partition: str
    limit: str = ""
    excluded: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs; those that are over stay in Slurm's memory for a while."""
        return self.state not in OVER

    @property
    def is_waiting(self) -> bool:
        """Whether it has no nodes yet, or no more."""
        return self.state in WAITING

    @property
    def is_held(self) -> bool:
        """Whether it waits for a `scontrol release`."""
        return self.is_waiting and (self.state in HELD or reasons.is_held(self.reason))


@dataclass(frozen=True)
class Pending:
    """A job that waits: `number` is an array's own where it is one; `command` is the path of its script, or what `--wrap` was given,
    with its arguments behind it."""

    number: str
    name: str
    command: str


@dataclass(frozen=True)
class Accounted:
    """A job in sacct; `state` is a single word, `exit_code` is `CODE:SIGNAL`, `by` the number of the user who cancelled it."""

    number: str
    state: str
    exit_code: str
    ended: str
    nodes: str
    limit: str = ""
    by: str = ""


def ask(program: str, *arguments: str) -> str | None:
    """Standard output of one of Slurm's programs; None where there is none, or it does not answer."""
    said, refusal = asked(program, *arguments)
    return said if refusal is None else None


def asked(program: str, *arguments: str) -> tuple[str, str | None]:
    """Its standard output, and, where it failed or is not there, why."""
    path = shutil.which(program)
    if path is None:
        return "", f"{program} is not on PATH"
    try:
        done = subprocess.run(
            [path, *arguments],
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},  # else a user's own, which nobody else reads
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return "", f"{program} does not answer in {PATIENCE_S:g} s"
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"{program} cannot be started: {error}"
    if done.returncode == 0:
        return done.stdout, None
    return done.stdout, done.stderr.strip() or f"exit code {done.returncode}"


def has_option(program: str, option: str) -> bool:
    """Whether one of Slurm's programs knows a long option, such as pyxis adds."""
    return option in (ask(program, "--help") or "")


def job(number: str) -> dict[str, str] | None:
    """`scontrol show job` of one that Slurm still remembers (MinJobAge after its end), by key."""
    return show_job_facts(ask("scontrol", "show", "job", "-o", number) or "") or None


def job_log(number: str) -> Path | None:
    """Where Slurm keeps what a job prints, as long as it remembers the job."""
    found = re.search(r"(?m)^\s*StdOut=(.+)$", ask("scontrol", "show", "job", number) or "")
    return Path(found[1]) if found else None


def queue(numbers: Iterable[str], *, ended: bool = False) -> dict[str, Queued] | None:
    """Those of these jobs that wait or run, by number, each task of an array for itself; None without a Slurm that answers.

    With `ended` also those that Slurm remembers (MinJobAge after their end).
    """
    wanted = sorted({number.partition("_")[0] for number in numbers if number[:1].isdigit()})
    if not wanted:
        return {} if shutil.which("squeue") else None
    states = ["-t", "all"] if ended else []
    said, refusal = asked("squeue", "-h", "-r", *states, "-j", ",".join(wanted), "-o", "\t".join(_QUEUE.values()))
    if refusal is not None:  # a single job that it knows no more is an error to squeue
        return {} if "Invalid job id" in refusal else None
    rows = [Queued(**dict(zip(_QUEUE, line.split("\t"), strict=True))) for line in said.splitlines()]
    return {row.number: row for row in rows}


def own_pending() -> list[Pending]:
    """This user's jobs that wait; empty without a Slurm that answers."""
    return pending_in(ask("squeue", "-h", "--me", "-t", "PENDING", "-o", "%F\t%j\t%o") or "")


def pending_in(said: str) -> list[Pending]:
    """Out of what squeue says; a job whose name or arguments have a line break takes several lines, of which none may be whole."""
    rows = [line.split("\t", 2) for line in said.split("\n")]
    return [Pending(*row) for row in rows if len(row) == len(dataclasses.fields(Pending)) and row[0].isdigit()]


def batch_script(number: str) -> str:
    """The script that a job of one's own was submitted with; empty where Slurm does not tell."""
    return ask("scontrol", "write", "batch_script", number, "-") or ""


def accounts(numbers: Iterable[str]) -> dict[str, Accounted]:
    """Those of these jobs that sacct knows; empty where Slurm keeps no accounts."""
    wanted = sorted({number for number in numbers if number[:1].isdigit()})
    if not wanted:
        return {}
    said = ask("sacct", "-X", "-n", "-P", "-j", ",".join(wanted), "-o", ",".join(_ACCOUNTS.values())) or ""
    rows = [dict(zip(_ACCOUNTS, line.split("|"), strict=False)) for line in said.splitlines()]
    return {
        row["number"]: Accounted(
            **{**row, "state": row["state"].split(" ")[0], "by": row["state"].partition(" by ")[2].strip()}
        )
        for row in rows
        if len(row) == len(_ACCOUNTS)
    }


def as_accounted(number: str) -> dict[str, Accounted]:
    """The same of one job that Slurm remembers still, where it keeps no accounts."""
    facts = job(number) or {}
    names = {
        "state": "JobState",
        "exit_code": "ExitCode",
        "ended": "EndTime",
        "nodes": "NodeList",
        "limit": "TimeLimit",
    }
    return {number: Accounted(number, **{key: facts.get(name, "") for key, name in names.items()})} if facts else {}


def first_queued(known: Iterable[str]) -> str | None:
    """The number of one of these jobs that waits or runs; an array's own number stands for all of its tasks."""
    return first_of(known, queue(known) or {})


def first_of(known: Iterable[str], queued: Iterable[str]) -> str | None:
    """The first of the queued numbers that is among those known; squeue answers for a task with all of its array."""
    wanted = set(known)
    return next((number for number in queued if number in wanted or number.partition("_")[0] in wanted), None)
