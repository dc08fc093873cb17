"""Real ranks ask about their nodes before they train: what they find, whose fault it is, and that it leaves no trace in the bytes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc.cluster.ledger import Cause, Ledger
from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.errors import MissingError, NodeError, RunDirError
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.tiny import gpt2hpc

pytestmark = pytest.mark.alone

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def settings(data: Manifest, **train: Any) -> Config:
    return tiny.config(data.where, **train)


def refused(run: RunDir, code: int) -> str:
    """The line of an error of the user's, of which the decision must know; nothing of the training has begun."""
    found = Ledger(run).outcome()
    assert found is not None
    assert (found.cause, found.exit_code) == (Cause.ERROR, code)
    assert not run.log.exists()
    return found.message


def suspected(run: RunDir) -> tuple[str, ...]:
    """The suspects of a crash: no outcome, so that the job starts again."""
    assert Ledger(run).outcome() is None
    assert not run.log.exists()
    (attempt,) = Ledger(run).attempts()
    return attempt.suspects


def nothing_is_left(run: RunDir) -> None:
    assert not list(run.path.glob(".preflight-*"))


def test_it_changes_no_bit(shared_data: Manifest, run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert tiny.run_ranks(run, settings(shared_data), nproc=4, options=["--nodes", "2"]) == 0
    shown = capfd.readouterr().out
    line = (
        r"preflight: 2 nodes × 2 ranks on cpu, all-reduce [\d.e-]+ GB/s, run directory writable from all, \d+\.\d s\n"
    )
    assert re.search(line, shown), shown
    nothing_is_left(run)
    without = RunDir(run.path.with_name("without"))
    assert tiny.run_ranks(without, settings(shared_data, preflight="off"), nproc=4) == 0
    assert "preflight: " not in capfd.readouterr().out  # the line of a start's phases may name one of 0.1 s
    assert tiny.content(tiny.newest(run)) == tiny.content(tiny.newest(without))


def test_here_it_is_thin_and_quick(shared_data: Manifest, run: RunDir) -> None:
    done = gpt2hpc("train", "--nproc", "2", "--run-dir", run.path, *tiny.flags(settings(shared_data)))
    assert done.returncode == 0, done.stderr
    found = re.search(r"preflight: 1 node × 2 ranks on cpu, run directory writable, (\d+\.\d) s", done.stdout)
    assert found, done.stdout
    assert float(found[1]) < 2, "0.0 s where nothing else runs"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_says_how_much_is_asked(
    shared_data: Manifest, run: RunDir, capfd: pytest.CaptureFixture[str], rank: int
) -> None:
    """A person's torchrun, of which some ranks do not know of the batch job: all ask the same, or they would wait for each other."""
    options = ["--job", str(rank), "local-n1-20260101000000-1"]
    short = settings(shared_data, total_steps=4)
    impatient = dataclasses.replace(short, requeue=dataclasses.replace(short.requeue, hang_minutes=0.5))
    assert tiny.run_ranks(run, impatient, nproc=2, options=options) == 0
    (line,) = re.findall("preflight: .*", capfd.readouterr().out)
    assert ("all-reduce" in line) == (rank != 0), "thin where the first knows of no batch job"


def test_another_version_on_one_node(shared_data: Manifest, run: RunDir) -> None:
    options = ["--nodes", "2", "--version", "1", "9.9"]
    assert tiny.run_ranks(run, settings(shared_data), nproc=2, options=options) == MissingError.exit_code
    assert "different versions of gpt2hpc: 0.1.0 on n0, 9.9 on n1; install one" in refused(run, MissingError.exit_code)
    nothing_is_left(run)


def test_another_version_than_the_submitters(
    shared_data: Manifest, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2HPC_SUBMITTED_VERSION", "9.9")
    assert tiny.run_ranks(run, settings(shared_data), nproc=2) == MissingError.exit_code
    told = refused(run, MissingError.exit_code)
    assert "gpt2hpc 9.9 submitted the job, but its ranks run gpt2hpc 0.1.0; install 9.9" in told


def test_a_version_that_is_newer_by_the_restart(
    shared_data: Manifest, run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Installed while the job ran: its batch script still names the old one, at each restart and in a new job."""
    assert tiny.run_ranks(run, settings(shared_data, total_steps=4), nproc=2) == 0
    monkeypatch.setenv("GPT2HPC_SUBMITTED_VERSION", "0.0.9")
    for restart, job, steps in ((1, "tiny", 6), (0, "another", 8)):
        longer = settings(shared_data, total_steps=steps)
        assert tiny.run_ranks(run, longer, nproc=2, restart=restart, job=job) == 0
        assert "gpt2hpc 0.0.9 submitted the job, but its ranks run" in capfd.readouterr().err


@as_root
def test_a_node_with_another_disk(shared_data: Manifest, run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    """It mounts something else where the others have the run directory."""
    options = ["--nodes", "2", "--other-disk", "n1"]
    assert tiny.run_ranks(run, settings(shared_data), nproc=4, options=options) == NodeError.exit_code
    assert suspected(run) == ("n1",)
    told = capfd.readouterr().err
    assert f"preflight: --run-dir={run.path} is not shared by all nodes (n1: what it writes there is not seen" in told
    nothing_is_left(run)


@as_root
def test_a_directory_on_each_nodes_own_disk(shared_data: Manifest, own_disk: RunDir) -> None:
    """No node is to blame for a run directory as /tmp/run, not even where the other one is the only one."""
    options = ["--nodes", "2", "--own-disks"]
    assert tiny.run_ranks(own_disk, settings(shared_data), nproc=2, options=options) == RunDirError.exit_code
    assert "; choose a directory on a file system that all of them mount" in refused(own_disk, RunDirError.exit_code)


@pytest.fixture
def own_disk(tmp_path: Path) -> Iterator[RunDir]:
    """Of the first node, mounted as the others have theirs."""
    yield from mounted(tmp_path / "own", "10m")


def test_a_directory_that_is_seen_late(shared_data: Manifest, run: RunDir) -> None:
    options = ["--nodes", "2", "--late-dir", "3"]
    assert tiny.run_ranks(run, settings(shared_data, total_steps=4), nproc=2, options=options) == 0


def test_settings_that_are_not_seen_in_time(
    shared_data: Manifest, run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rank began with the defaults, and would compute other bits; the preflight is not asked."""
    wished = settings(shared_data, deterministic=True, preflight="off")
    assert tiny.run_ranks(run, wished, nproc=2, options=["--nodes", "2", "--blind", "1"]) == NodeError.exit_code
    assert "ranks on n1 did not see the run's config.yaml when they began" in capfd.readouterr().err
    assert suspected(run) == ("n1",)


@as_root
def test_a_disk_that_is_too_small(shared_data: Manifest, small_disk: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert tiny.run_ranks(small_disk, settings(shared_data), nproc=2) == RunDirError.exit_code
    assert "GB free, but checkpoints of" in refused(small_disk, RunDirError.exit_code)
    assert "hashed" not in capfd.readouterr().out, "only after the data was read"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[RunDir]:
    """A run directory with 400 kB, of which a checkpoint of the tiny model needs as much."""
    yield from mounted(tmp_path / "small", "400k")


def mounted(folder: Path, size: str) -> Iterator[RunDir]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield RunDir(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_floor_missed_on_one_node(shared_data: Manifest, run: RunDir) -> None:
    high = settings(shared_data, min_allreduce_gb_s=1e6)
    assert tiny.run_ranks(run, high, nproc=2, options=["--nodes", "1"]) == NodeError.exit_code
    assert suspected(run) == ("n0",)


def test_a_floor_missed_because_of_one_node(
    shared_data: Manifest, run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = settings(shared_data, min_allreduce_gb_s=1e6)
    options = ["--nodes", "4", "--slow-link", "n2"]
    assert tiny.run_ranks(run, slow, nproc=4, options=options) == NodeError.exit_code
    assert "GB/s is below train.min_allreduce_gb_s=1e+06; slow: n2; the slowest in GB/s: " in capfd.readouterr().err
    assert suspected(run) == ("n2",)


def test_the_sites_floor_is_not_for_cpus(shared_data: Manifest, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2HPC_MIN_ALLREDUCE_GB_S", "1e6")
    assert tiny.run_ranks(run, settings(shared_data, total_steps=4), nproc=2, options=["--nodes", "2"]) == 0


def test_a_floor_that_is_no_number(shared_data: Manifest, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2HPC_MIN_ALLREDUCE_GB_S", "fast")
    assert tiny.run_ranks(run, settings(shared_data), nproc=2) == 3
    assert "GPT2HPC_MIN_ALLREDUCE_GB_S=fast in the environment must be a number" in refused(run, 3)
