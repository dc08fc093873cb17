"""`gpt2hpc prepare` with real processes: killed, stopped, on a full disk; and a shard that has changed since."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt2hpc.data import catalog, demo
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.tiny import gpt2hpc

ROOT = Path(__file__).parents[2]
OPTIONS = ("--unit-tokens", "5000", "--processes", "2", "--tokenizer", "tiktoken")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in files, thirty units or so."""
    folder = tmp_path_factory.mktemp("source")
    for number, text in enumerate(demo.demo_documents()):
        (folder / f"{number:04d}.txt").write_text(text[:3000])
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    done = gpt2hpc("prepare", "--source", source, "--out", out, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("unit_*.json"))) > 15
    return out


def slow(tmp_path: Path, pace_s: float = 0.02) -> dict[str, str]:
    """Environment for a process that leaves time to act; see the module it names."""
    begun = tmp_path / "begun"
    begun.mkdir(exist_ok=True)
    return {
        "PYTHONPATH": f"{ROOT}/tests/cluster/slow:{ROOT}",
        "KIT_DOCUMENT_PACE_S": str(pace_s),
        "KIT_BEGUN": str(begun),
    }


@contextlib.contextmanager
def preparing(source: Path, out: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "gpt2hpc", "prepare", "--source", str(source), "--out", str(out), *OPTIONS]
    environment = {**os.environ, **slow(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while len(list(out.glob("unit_*.json"))) < 3:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def workers_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def is_gone(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def until(happened: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def same(out: Path, whole: Path) -> bool:
    names = sorted(path.name for path in whole.iterdir() if not path.name.startswith("unit_"))
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("unit_")) == names
    return all((out / name).read_bytes() == (whole / name).read_bytes() for name in names if name != "plan.json")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_stops_at_once_and_leaves_nothing_behind(
    number: int, source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with preparing(source, out, tmp_path) as process:
        workers = workers_of(process.pid)
        assert len(workers) == 2
        os.killpg(process.pid, number)  # as Ctrl-C and Slurm do: to the workers too
        _, error = process.communicate(timeout=15)
    assert process.returncode == 6
    assert "units done; run the same command again: it does the others alone" in error
    assert error.count("\n") == 1, error
    assert all(map(is_gone, workers))
    assert not list(out.glob(".*.tmp"))
    done = gpt2hpc("prepare", "--out", out, *OPTIONS)
    assert "done already" in done.stdout
    assert same(out, whole)


def test_workers_do_not_outlive_a_killed_parent(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with preparing(source, out, tmp_path) as process:
        workers = workers_of(process.pid)
        process.kill()
    until(lambda: all(map(is_gone, workers)))
    assert gpt2hpc("prepare", "--out", out, *OPTIONS).returncode == 0
    assert same(out, whole)


def test_a_killed_worker_is_an_error_with_a_mend(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with preparing(source, out, tmp_path) as process:
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        _, error = process.communicate(timeout=15)
    assert process.returncode == 8
    assert "a process was killed, most likely for want of memory" in error
    assert error.count("\n") == 1, error
    assert gpt2hpc("prepare", "--out", out, *OPTIONS).returncode == 0
    assert same(out, whole)


def test_a_full_disk_is_said_and_a_rerun_finishes(source: Path, whole: Path, tmp_path: Path) -> None:
    """A real one of half the size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in whole.iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={needed // 2}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no file system can be mounted here (root)")
    try:
        full = gpt2hpc("prepare", "--source", source, "--out", disk / "out", *OPTIONS)
        assert full.returncode == 4
        assert "No space left on device; what is done is kept" in full.stderr
        assert full.stderr.count("\n") == 1
        assert not list((disk / "out").glob(".*.tmp"))
        assert not (disk / "out" / "manifest.json").exists()
        kept = len(list((disk / "out").glob("unit_*.json")))
        assert kept > 0
        subprocess.run(["mount", "-o", f"remount,size={2 * needed}", str(disk)], check=True)
        again = gpt2hpc("prepare", "--source", source, "--out", disk / "out", *OPTIONS)
        assert again.returncode == 0, again.stderr
        assert f"{kept} units done already" in again.stdout
        assert same(disk / "out", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


QUOTA = """
import errno, os
fsync, calls = os.fsync, 0
def limited(descriptor):
    global calls
    calls += 1
    if calls == 12:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    fsync(descriptor)
os.fsync = limited
"""


def test_a_quota_is_said_and_a_rerun_finishes(source: Path, whole: Path, tmp_path: Path) -> None:
    """Its error comes from fsync, as on NFS; raised here by the process itself, since few test machines have quotas."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(QUOTA)
    out, environment = tmp_path / "out", {"PYTHONPATH": f"{tmp_path}/site:{ROOT}"}
    done = gpt2hpc("prepare", "--source", source, "--out", out, *OPTIONS, env=environment)
    assert done.returncode == 4
    assert os.strerror(errno.EDQUOT) in done.stderr
    assert not list(out.glob(".*.tmp"))
    assert gpt2hpc("prepare", "--out", out, *OPTIONS).returncode == 0
    assert same(out, whole)


# A byte that changed ------------------------------------------------------------------------------------------------


def flip(path: Path, at: int = 999) -> None:
    contents = bytearray(path.read_bytes())
    contents[at] ^= 1
    path.write_bytes(contents)


def test_verify_and_training_name_a_flipped_byte(data: Path, tmp_path: Path) -> None:
    assert gpt2hpc("verify", data).returncode == 0
    flip(data / "train_000002.npy")
    verified = gpt2hpc("verify", data)
    assert verified.returncode == 4
    assert "train_000002.npy has sha256" in verified.stdout
    run = RunDir(tmp_path / "run")
    trained = gpt2hpc("train", "--run-dir", run.path, *tiny.flags(tiny.config(data)))
    assert trained.returncode == 4
    assert "train_000002.npy has sha256" in trained.stderr
    assert "damaged since it was made" in trained.stderr
    assert not run.has_checkpoints


def test_a_run_hashes_each_shard_once(data: Path, tmp_path: Path) -> None:
    """And again those that were written to in between."""
    run = RunDir(tmp_path / "run")
    words = ("train", "--run-dir", run.path, *tiny.flags(tiny.config(data)))
    first = gpt2hpc(*words, "--steps", "3")
    assert first.returncode == 0, first.stderr
    assert "hashed 0.0 MB of shards" in first.stdout
    second = gpt2hpc(*words, "--steps", "6")
    assert second.returncode == 0, second.stderr
    assert "hashed" not in second.stdout
    flip(data / "train_000001.npy")
    third = gpt2hpc(*words, "--steps", "9")
    assert third.returncode == 4
    assert "train_000001.npy has sha256" in third.stderr


def test_staging_to_the_node_refuses_a_flipped_byte(data: Path, tmp_path: Path) -> None:
    words = (
        "train",
        "--nproc",
        "2",
        *tiny.flags(tiny.config(data)),
        "--data.stage=true",
        f"--data.cache_dir={tmp_path / 'c'}",
    )
    assert gpt2hpc(*words, "--run-dir", tmp_path / "good").returncode == 0
    assert list((tmp_path / "c").iterdir()) == [], "a run that has ended leaves nothing on the node"
    flip(data / "train_000001.npy")
    done = gpt2hpc(*words, "--run-dir", tmp_path / "bad", f"--data.cache_dir={tmp_path / 'other'}")
    assert done.returncode == 4
    assert "train_000001.npy is damaged: its bytes are not those of the manifest" in done.stderr


def test_adopted_shards_have_hashes(tmp_path: Path) -> None:
    found = tiny.make_data(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    assert catalog.load(str(tmp_path / "data")).shards[0].sha256 is None
    assert gpt2hpc("verify", tmp_path / "data", "--adopt").returncode == 0
    adopted = catalog.load(str(tmp_path / "data"))
    assert {shard.sha256 for shard in adopted.shards} == {shard.sha256 for shard in found.shards}
    flip(tmp_path / "data" / "train_000001.npy")
    assert gpt2hpc("verify", tmp_path / "data").returncode == 4


# Progress -----------------------------------------------------------------------------------------------------------


def test_a_log_has_lines_with_share_rate_and_time_left(source: Path, tmp_path: Path) -> None:
    done = gpt2hpc("prepare", "--source", source, "--out", tmp_path / "out", *OPTIONS)
    assert re.search(r"(?m)^100%  unit (\d+)/\1  [\d.]+ Mtok  [\d.]+ Mtok/s  ETA 0:00$", done.stdout), done.stdout
    assert "\x1b" not in done.stdout


def test_a_terminal_has_a_live_bar(source: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "gpt2hpc",
        "prepare",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "out"),
        *OPTIONS,
    ]
    environment = {**os.environ, **slow(tmp_path, 0.005), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(ours, 65536):
                shown += chunk
        os.close(ours)
    assert process.returncode == 0, shown.decode()
    drawn = re.findall(r"[━╸╺]+.*?(\d+)%  unit \d+/\d+", shown.decode())
    assert len(set(drawn)) > 3, shown.decode()[-2000:]
