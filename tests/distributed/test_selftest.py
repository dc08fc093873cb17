"""`gpt2hpc selftest`, for real: in the poorest surroundings it passes, and each trial fails for what it is about, alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import gpt2hpc
from gpt2hpc.cluster import liveness
from gpt2hpc.finding import Timed
from gpt2hpc.trials import rounds
from gpt2hpc.trials.bench import Bench
from gpt2hpc.trials.imports import PACKAGES
from tests import tiny

pytestmark = [
    pytest.mark.timeout(2400),  # a minute of computing, which a busy machine may draw out
    pytest.mark.skipif(
        shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which this machine lacks"
    ),
]
PACKAGE = Path(gpt2hpc.__file__).parent
NAMES = ["temporary directory", *(trial.name for trial in rounds.TRIALS)]
ODD_USER = 54321


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user reaches, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="gpt2hpc-poor-") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


def selftest(*options: str, env: Mapping[str, str], prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-m", "gpt2hpc", "selftest", "--cpu", *options],
        env=dict(env),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def states(said: str) -> dict[str, tuple[str, str]]:
    return {each["name"]: (each["state"], each["text"]) for each in json.loads(said)}


def poor(place: Path) -> tuple[str, ...]:
    """Begins a command of Python's: no network, a user without a name, nothing writable but `place/tmp`, which is listed at the end.

    Python and the project may be where root alone can go, and are shown in `place` too.
    """
    program = Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    shown = {"python": sys.base_prefix, "packages": sysconfig.get_path("purelib"), "source": PACKAGE.parent}
    script = f"""
        ip link set lo up
        {"; ".join(f"mkdir -p {place}/{name}; mount --bind {path} {place}/{name}" for name, path in shown.items())}
        mkdir -p {place}/tmp; mount -t tmpfs none {place}/tmp && chmod 1777 {place}/tmp && mount -o remount,bind,ro / || exit 1
        setpriv --reuid={ODD_USER} --regid={ODD_USER} --clear-groups {place}/python/{program} "$@"
        code=$?
        ls -A {place}/tmp
        exit $code"""
    return "unshare", "--net", "--mount", "sh", "-c", script, "sh"


LOOK = """
import os, pwd, socket
from pathlib import Path
try: pwd.getpwuid(os.getuid())
except KeyError: print("nameless")
try: Path("/var/tmp/gpt2hpc").touch()
except OSError: print("read-only")
print([name for _, name in socket.if_nameindex()], os.environ.get("HOME"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this is not root, who takes network, disks and its name from a process")
def test_it_passes_without_network_home_name_or_a_writable_root(place: Path) -> None:
    env = {"TMPDIR": f"{place}/tmp", "PATH": "/usr/bin:/bin", "PYTHONPATH": f"{place}/source:{place}/packages"}
    env["LD_LIBRARY_PATH"] = f"{place}/python/lib"  # a Python of its own may be linked with a library of its own
    looked, done = (
        subprocess.run([*poor(place), *words], env=env, capture_output=True, text=True, cwd="/", check=False)
        for words in (("-c", LOOK), ("-m", "gpt2hpc", "selftest", "--cpu"))
    )
    assert looked.stdout.splitlines() == ["nameless", "read-only", "['lo'] None"], looked.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first.endswith("tried on the CPU")
    assert [line.split(":")[0].split("s  ", 1)[1] for line in lines] == NAMES
    assert all(line.startswith("OK ") for line in lines)
    assert last == "all 7 are well: this installation works here"
    assert done.stderr == ""


def broken_copy(folder: Path) -> Path:
    """The package with a fault for each trial, and a package that it needs which does not load."""
    shutil.copytree(PACKAGE, folder / "gpt2hpc", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in (
        ("assets/r50k_base.tiktoken", "IQ== 0\n", "IQ== 1\n"),
        ("model/gpt.py", "normal_(0.0, 0.02 * scale)", "normal_(0.0, 0.5 * scale)"),
        ("training/trainer.py", "state.restore_rank_state(rank_state, self.ranks.device)", "None"),
        ("trials/allreduce.py", "dist.all_reduce(numbers)", "None"),
    ):
        path = folder / "gpt2hpc" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{old} in {name}"
        path.write_text(text.replace(old, new))
    (folder / "transformers.py").write_text("raise OSError('libgone.so.1: cannot open shared object file')\n")
    return folder


def test_each_fails_for_its_own_reason_and_stops_no_other(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": str(broken_copy(tmp_path)),
        "TORCHDYNAMO_DISABLE": "1",
        "TMPDIR": str(tmp_path / "absent"),
    }
    done = selftest("--json", env=env)
    assert done.returncode == 8, done.stdout + done.stderr
    found = states(done.stdout)
    assert list(found) == NAMES
    reasons = {
        "temporary directory": "absent cannot be written to, and ",
        "imports": "transformers does not load (OSError: libgone.so.1",
        "tokenizer": "r50k_base.tiktoken has sha256",
        "forward and backward": "the loss of random weights is ",
        "compiled step": "compiled nothing, without a word",
        "all-reduce": "the sum is wrong",
        "save and resume": "rank-00000.safetensors differs between a resumed training and an undisturbed one",
    }
    for name, reason in reasons.items():
        state, text = found[name]
        assert (state, reason in text) == ("FAIL", True), f"{name}: {text}"
        assert "; " in text, "the mend"
        assert "\n" not in text


def tried(tmp_path: Path, module: str, **env: str) -> Timed:
    """One of the trials, with these variables."""
    alone = [trial for trial in rounds.TRIALS if trial.module == module]
    [result] = rounds.made(Bench("cpu", tmp_path, 0), {**os.environ, **env}, alone)
    return result


def test_one_that_crashes_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "tiktoken.py").write_text("import os\nprint('about to', flush=True)\nos.abort()\n")
    result = tried(tmp_path, "tokens", PYTHONPATH=f"{tmp_path / 'shim'}:{PACKAGE.parent}")
    assert result.state == "FAIL"
    assert result.text.startswith("its process was killed by SIGABRT: about to; reinstall ")


def test_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PATIENCE_S", 3.0)
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "tiktoken.py").write_text(
        "import time\nwhile True:\n    try:\n        time.sleep(3600)\n    except BaseException: pass\n"
    )
    result = tried(tmp_path, "tokens", PYTHONPATH=f"{tmp_path / 'shim'}:{PACKAGE.parent}")
    assert (result.state, result.text.split(";")[0]) == ("FAIL", "it did not end in 3 s")


def test_processes_that_do_not_find_each_other(tmp_path: Path) -> None:
    result = tried(tmp_path, "allreduce", GLOO_SOCKET_IFNAME="nosuch0")
    assert result.state == "FAIL"
    assert "2 processes ended with exit code 1: " in result.text


def test_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """What --gpu tries, and a job's own environment does not get in between."""
    [step] = [trial for trial in rounds.TRIALS if trial.module == "step"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "RANK": "3", "WORLD_SIZE": "4", "SLURM_JOB_GPUS": "0"}
    [result] = rounds.made(Bench("cuda", tmp_path, 0), env, [step])
    assert result.state == "FAIL"
    assert "CUDA is not available to torch" in result.text


def test_nowhere_to_write() -> None:
    if os.geteuid() != 0:
        pytest.skip("this is not root, who takes disks from a process")
    shut = " && ".join(
        f"mount --bind {each} {each} && mount -o remount,bind,ro {each}" for each in ("/tmp", "/var/tmp")
    )
    shell = f'mount -o remount,bind,ro / && {shut} && exec "$@"'
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent)}
    done = selftest(env=env, prefix=("unshare", "--mount", "sh", "-c", shell, "sh"))
    assert done.returncode == 8, done.stdout + done.stderr
    assert "FAIL" in done.stdout
    assert "set TMPDIR to a directory of yours" in done.stdout


def test_all_that_the_project_asks_for_is_imported() -> None:
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    names = {each.split(">")[0].split("[")[0].replace("pyyaml", "yaml") for each in wanted}
    assert names == {package.split(".")[0] for package in PACKAGES}


def test_options_that_exclude_each_other() -> None:
    done = tiny.gpt2hpc("selftest", "--cpu", "--gpu")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_that_is_told_to_end_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """As `scancel`, `timeout` and a closed terminal tell it: that process alone."""
    command = [sys.executable, "-m", "gpt2hpc", "selftest", "--cpu"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not (trials := running_in(tmp_path)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 6, said
    assert said == "gpt2hpc: interrupted\n"
    assert list(tmp_path.iterdir()) == []
    assert not running_in(tmp_path), f"the trial {trials} goes on"


def running_in(folder: Path) -> list[int]:
    """Trials whose directory is below that folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if b"gpt2hpc.trials\0" in words and bytes(folder) in words:
                found.append(int(path.parent.name))
    return found


def test_what_a_trial_has_started_ends_with_it(tmp_path: Path) -> None:
    script = "trap '' INT; sleep 600 & echo $! >pid.new; mv pid.new pid; wait"
    with subprocess.Popen(
        ["sh", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        rounds._end(process)
        assert process.returncode == -signal.SIGKILL
    sleeper = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while liveness.process_identity(sleeper):
        assert time.monotonic() < deadline, "it outlives its trial"
        time.sleep(0.05)
