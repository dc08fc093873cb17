"""Array jobs that tokenize, on the real Slurm: killed, requeued, preempted and doubled, and yet the bytes of a single process."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpt2hpc.data import catalog, demo, encode, plan
from tests.cluster.kit import ENDED, ROOT, Kit, drives, long
from tests.tiny import gpt2hpc

UNITS, DOCUMENTS = 40, 12
TEMPLATE = ROOT / "slurm" / "prepare_array.sbatch"
SLOW = ROOT / "tests" / "cluster" / "slow"


def parquet(folder: Path) -> Path:
    """Real text in as many row groups as there shall be units."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [text[:4000] for text in demo.demo_documents()][: UNITS * DOCUMENTS]
    assert len(texts) == UNITS * DOCUMENTS
    path = folder / "texts.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=DOCUMENTS)
    return path


@dataclass
class Array:
    """What became of arrays that shared a directory."""

    out: Path
    whole: Path
    begun: Path
    logs: Path
    numbers: list[str] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    restarts: int = 0

    def told(self) -> str:
        return "".join(path.read_text() for path in sorted(self.logs.glob("*.log")))


def prepared_whole(kit: Kit, name: str) -> Array:
    """The result of one process, and room for that of many."""
    folder = kit.folder / name
    for each in ("begun", "logs"):
        (folder / each).mkdir(parents=True)
    done = gpt2hpc(
        "prepare", "--source", parquet(folder), "--out", folder / "whole", "--unit-tokens", "1", "--processes", "1"
    )
    assert done.returncode == 0, done.stderr
    return Array(folder / "shared", folder / "whole", folder / "begun", folder / "logs")


def variables(kit: Kit, array: Array, pace_s: float) -> dict[str, str]:
    return {
        **kit.variables,
        "PYTHON": kit.python,
        "SOURCE": str(array.whole.parent / "texts.parquet"),
        "OUT": str(array.out),
        "PYTHONPATH": f"{SLOW}:{ROOT}",
        "KIT_DOCUMENT_PACE_S": str(pace_s),
        "KIT_BEGUN": str(array.begun),
    }


def sbatch(kit: Kit, array: Array, *flags: str, pace_s: float) -> str:
    log = f"--output={array.logs}/%A_%a.log"
    command = ["sbatch", "--parsable", "--cpus-per-task=1", log, *flags, str(TEMPLATE), "--unit-tokens", "1"]
    number = kit._run(command, variables(kit, array, pace_s)).strip()
    array.numbers.append(number)
    return number


def states(kit: Kit, number: str) -> dict[str, str]:
    """State of each task of an array."""
    text = kit.cluster.run("scontrol", "show", "job", "-o", number)
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    return {row.get("ArrayTaskId", "0"): row["JobState"] for row in rows}


def restarts(kit: Kit, number: str) -> int:
    return sum(map(int, re.findall(r"Restarts=(\d+)", kit.cluster.run("scontrol", "show", "job", "-o", number))))


def until_over(kit: Kit, array: Array, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while any(state not in ENDED for number in array.numbers for state in states(kit, number).values()):
        assert time.monotonic() < deadline, (
            f"{[states(kit, number) for number in array.numbers]}\n{array.told()[-4000:]}"
        )
        time.sleep(0.5)
    array.restarts = sum(restarts(kit, number) for number in array.numbers)


def processes(numbers: list[str]) -> Iterator[int]:
    """Those of the arrays' tasks that encode: parents and their workers."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes()
            ours = any(f"SLURM_ARRAY_JOB_ID={number}".encode() in environment for number in numbers)
            if ours and (b"gpt2hpc.prepare" in words or b"spawn_main" in words) and not words.startswith(b"srun"):
                yield int(path.name)


STRIKES = ("kill", "requeue", "signal", "kill", "preempt", "requeue", "kill", "signal", "preempt")


def strike(kit: Kit, array: Array, chance: random.Random, nodes: list[str]) -> None:
    """One of the things that happen to a task, to whichever it hits."""
    number, task = chance.choice(array.numbers), chance.randrange(8)
    kind = STRIKES[len(array.struck) % len(STRIKES)]
    if kind == "kill":
        pids = list(processes(array.numbers))
        if not pids:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
    elif kind == "requeue":
        kit.cluster.run("scontrol", "requeue", f"{number}_{task}", check=False)
    elif kind == "signal":
        kit.cluster.run("scancel", "-s", "USR2", f"{number}_{task}", check=False)
    else:
        kit.preempt(chance.choice(nodes))
    array.struck.append(kind)


@long
def drive_tortured(kit: Kit) -> Array:
    """Two arrays of eight tasks over the same forty units, struck until most units are done, then submitted again."""
    array = prepared_whole(kit, "tortured")
    chance = random.Random(4)
    with kit.nodes() as pair:
        nodes = pair.split(",")
        for partition in ("low", "lowc"):
            sbatch(kit, array, "--array=0-7", "-p", partition, "-w", nodes[len(array.numbers)], "--nodes=1", pace_s=0.3)
        deadline = time.monotonic() + 120
        while not list(array.begun.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.1)
        while len(list(array.out.glob("unit_*.json"))) < 0.8 * UNITS and time.monotonic() < deadline:
            time.sleep(chance.uniform(0.1, 0.8))
            strike(kit, array, chance, nodes)
        until_over(kit, array)
        while not (array.out / "manifest.json").exists():  # those that were killed too often
            assert len(array.numbers) < 6, array.told()[-4000:]
            sbatch(kit, array, "--array=1-5", "-w", nodes[0], "--nodes=1", pace_s=0.0)  # another number of tasks
            until_over(kit, array)
    return array


def same_bytes(one: Path, other: Path) -> None:
    """Manifest and shards; who made a unit is noted in its record, and differs."""
    names = [
        {path.name for path in each.iterdir() if path.suffix in (".npy", ".json", ".tmp")} for each in (one, other)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if not name.startswith("unit_"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@drives(drive_tortured)
def test_a_tortured_array_makes_the_bytes_of_one_process(driven: Array) -> None:
    assert {"kill", "requeue", "signal", "preempt"} <= set(driven.struck), driven.struck
    assert driven.restarts >= 3, driven.told()[-4000:]
    assert "\x1b" not in driven.told(), "a log is no terminal"
    assert re.search(r"(?m)^ *\d+%  unit \d+/\d+ .* Mtok/s  ETA ", driven.told())
    same_bytes(driven.out, driven.whole)
    verified = gpt2hpc("verify", driven.out)
    assert verified.returncode == 0, verified.stderr


@drives(drive_tortured)
def test_no_unit_is_begun_once_its_record_is_there(driven: Array) -> None:
    the_plan = plan.load(driven.out)
    begun = [path.read_text().split() for path in driven.begun.iterdir()]
    starts = [(int(unit), float(when)) for unit, when in (words for words in begun if words)]
    assert {unit for unit, _ in starts} == set(range(UNITS))
    assert len(starts) > UNITS, "no task was doubled or killed at work, so this shows nothing"
    for unit, when in starts:  # half a second is what a busy machine may need between looking and beginning
        there = encode.record_path(driven.out, the_plan.units[unit]).stat().st_mtime
        assert when <= there + 0.5, f"unit {unit} was begun {when - there:.2f} s after its record was there"


@drives(drive_tortured)
def test_nothing_is_left_running(driven: Array) -> None:
    deadline = time.monotonic() + 20
    while list(processes(driven.numbers)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not list(processes(driven.numbers))


# Submitted by submitit ----------------------------------------------------------------------------------------------


def submit(kit: Kit, array: Array, nodes: str, *words: str, pace_s: float = 0.0) -> str:
    site = array.logs.parent / "site.yaml"
    site.write_text(f"python: {kit.python}\nsbatch: {{nodelist: '{nodes}'}}\n")
    source = str(array.whole.parent / "texts.parquet")
    options = [
        "--source",
        source,
        "--out",
        str(array.out),
        "--unit-tokens",
        "1",
        "--cpus-per-task",
        "1",
        f"--site={site}",
    ]
    command = [sys.executable, "-m", "gpt2hpc.submit", "prepare", *options, *words]
    told = kit._run(command, variables(kit, array, pace_s))
    array.numbers += re.findall(
        r"\b\d+\b", " ".join(re.findall(r"^\d+ arrays? ([\d, ]+):|then job (\d+)", told, re.MULTILINE)[0])
    )
    array.numbers += re.findall(r"then job (\d+)", told)
    return told


@dataclass
class Submitted:
    array: Array
    told: str
    again: str
    status: str
    dependency: str


def drive_submitted(kit: Kit) -> Submitted:
    """More tasks than Slurm takes in one array here."""
    array = prepared_whole(kit, "submitted")
    with kit.nodes() as pair:
        node = pair.split(",")[0]
        told = submit(kit, array, node, "--array", "10", pace_s=0.05)
        dependency = kit.cluster.job(array.numbers[-1]).get("Dependency", "")
        while not list(array.out.glob("unit_*.json")):
            time.sleep(0.2)
        status = gpt2hpc("status", array.out).stdout
        until_over(kit, array)
        again = kit._run(
            [sys.executable, "-m", "gpt2hpc.submit", "prepare", "--out", str(array.out)], variables(kit, array, 0.0)
        )
    return Submitted(array, told, again, status, dependency)


@drives(drive_submitted)
def test_more_tasks_than_an_array_takes(driven: Submitted) -> None:
    *arrays, last = driven.array.numbers
    assert len(arrays) == 2, driven.told
    assert all(number in driven.dependency for number in arrays), driven.dependency
    assert "afterany" in driven.dependency
    same_bytes(driven.array.out, driven.array.whole)
    logs = list((driven.array.out / "slurm").glob("*_log.out"))
    assert len(logs) == 11
    assert "train" in (driven.array.out / "slurm" / f"{last}_0_log.out").read_text()


@drives(drive_submitted)
def test_what_is_done_is_not_submitted_again(driven: Submitted) -> None:
    assert "every unit is done already" in driven.again
    assert "array" not in driven.again


@drives(drive_submitted)
def test_status_shows_an_arrays_progress(driven: Submitted) -> None:
    assert re.search(r"shared +preparing +\d+/40 +\d+%", driven.status), driven.status


def drive_cancelled(kit: Kit) -> tuple[Array, str, str]:
    """A user's scancel in the middle: the job that waits for the array tells what is missing, and the next submission does it."""
    array = prepared_whole(kit, "cancelled")
    with kit.nodes() as pair:
        node = pair.split(",")[0]
        submit(kit, array, node, "--array", "4", pace_s=0.2)
        number, last = array.numbers
        while not list(array.out.glob("unit_*.json")):
            time.sleep(0.2)
        kit.cluster.run("scancel", number)
        until_over(kit, array)
        complaint = (array.out / "slurm" / f"{last}_0_log.out").read_text()
        cancelled = " ".join(sorted(set(states(kit, number).values())))
        submit(kit, array, node, "--array", "3")
        until_over(kit, array)
    return array, complaint, cancelled


@drives(drive_cancelled)
def test_a_cancelled_array_stays_away_and_is_completed_by_the_next(driven: tuple[Array, str, str]) -> None:
    array, complaint, cancelled = driven
    assert cancelled == "CANCELLED"
    assert re.search(r"\d+ of 40 units in .* are not done", complaint), complaint
    same_bytes(array.out, array.whole)
    assert catalog.load(str(array.out)).tokens("train")


def test_the_dry_run_submits_nothing(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    command = [sys.executable, "-m", "gpt2hpc.submit", "prepare", "--source", "a.txt", "--out", "out", "--dry-run"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=kit.cluster.environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --cpus-per-task=4" in done.stdout
    assert not (tmp_path / "out").exists()
    assert "prepare-out" not in kit.cluster.run("squeue", "-h", "-o", "%j")


@pytest.mark.parametrize("words", [["--array", "0"], ["--at-once", "0"]])
def test_numbers_that_cannot_be(words: list[str]) -> None:
    done = gpt2hpc("submit", "prepare", "--source", "demo", "--out", "/nowhere/out", *words)
    assert done.returncode == 2
    assert "must be 1 or more" in done.stderr
