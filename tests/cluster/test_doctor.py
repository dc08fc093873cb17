"""`gpt2hpc doctor` on the real Slurm, as a user reads it on a terminal, and on machines that something is wrong with."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import KILL_WAIT_S, Cluster

DOCTOR = (sys.executable, "-m", "gpt2hpc", "doctor")
SAVE = r"a save takes about 5 s \(for 1\.5 GB of gpt2-124m-ctx1024\)"


def on_terminal(command: list[str], env: dict[str, str], folder: Path) -> tuple[int, str]:
    """Exit code, and all that is seen."""
    terminal, other = pty.openpty()
    process = subprocess.Popen(command, env=env, cwd=folder, stdin=other, stdout=other, stderr=other)
    os.close(other)
    seen = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # nobody writes any more
            break
        if not part:
            break
        seen += part
    os.close(terminal)
    return process.wait(timeout=60), seen.decode().replace("\r\n", "\n")


@pytest.fixture
def here(cluster: Cluster, tmp_path: Path) -> dict[str, str]:
    """The environment of a user without a site profile."""
    own = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config"), "TMPDIR": "/tmp", "LC_ALL": "C.UTF-8"}
    return {**cluster.environment, **own}


def looked(
    env: dict[str, str], folder: Path, *flags: str, code: int | None = 0, before: str = ""
) -> dict[str, tuple[str, str]]:
    """State and text by name; `before` is shell that is done first. Without a `code`, the one that what was found asks for."""
    command = ["bash", "-c", f"{before or ':'}\nexec {shlex.join([*DOCTOR, '--json', *flags])}"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    return findings(done, code)


def findings(done: subprocess.CompletedProcess[str], code: int | None) -> dict[str, tuple[str, str]]:
    assert done.stderr == "", done.stderr
    found = {each["name"]: (each["state"], each["text"]) for each in json.loads(done.stdout)}
    if code is None:
        code = 8 if any(state == "MISSING" for state, _ in found.values()) else 0
    assert done.returncode == code, done.stdout
    return found


def section(page: str, title: str) -> str:
    return page.partition(f"\n\n{title}\n")[2].partition("\n\n")[0]


def test_what_a_user_of_this_cluster_reads(here: dict[str, str], tmp_path: Path) -> None:
    code, page = on_terminal([*DOCTOR], here, tmp_path)
    assert code == (8 if " MISSING" in page or "\nMISSING" in page else 0), page
    assert re.match(r"gpt2hpc \d\S+, on \S+, from where jobs are submitted\n", page)
    slurm = section(page, "Slurm").splitlines()
    assert re.fullmatch(r"OK      slurm: \d+\.\S+, cluster kit", slurm[0])
    assert re.fullmatch(rf"OK      KillWait: {KILL_WAIT_S} s from SIGTERM to SIGKILL; {SAVE}", slurm[1])
    assert slurm.pop(2).startswith(
        "OK      preempt_send_user_signal: a script's own --signal is not sent at a preemption;"
    )
    assert slurm[2] == "OK      JobRequeue: 1: jobs come back after a preemption or a lost node"
    assert re.fullmatch(r"OK      ProctrackType: (cgroup|linuxproc): a signal .*", slurm[3])
    assert slurm[4].startswith("OK      MaxArraySize: 9: ")
    assert slurm[5].startswith("WARN    sacct: none are kept: 3600 sec after its end")
    assert len(slurm) == 6
    assert section(page, "What a job would ask for").splitlines() == [
        "OK      partition: main, 8 nodes",
        "OK      time limit: 00:30:00 unless --time says otherwise, UNLIMITED at most; a job saves before, and goes on",
        "OK      preemption: none in main",
        "WARN    other partitions: a job that is preempted in low0 has no grace, and may lose the steps since its last save; "
        "look with --partition NAME",
        "OK      sbatch: would take a job with --nodes=1",
    ]
    for title in ("Container", "Ranks", "Disks", "Limits of this shell", "Python", "Tokenizer and data"):
        assert re.match(r"(OK|WARN|MISSING) ", section(page, title)) or title == "Container", page
    missing, warnings = len(re.findall("(?m)^MISSING", page)), len(re.findall("(?m)^WARN", page))
    assert page.splitlines()[-1] == f"{missing} missing, {warnings} warning{'s' * (warnings != 1)}"


def test_a_partition_that_preempts(here: dict[str, str], tmp_path: Path) -> None:
    state, text = looked(here, tmp_path, "--partition", "low")["preemption"]
    assert (state, re.match(rf"low \(PreemptMode=REQUEUE\): GraceTime=30 s to save in; {SAVE}", text) is not None) == (
        "OK",
        True,
    )
    state, text = looked(here, tmp_path, "--partition", "low0")["preemption"]
    assert (state, f"GraceTime=0 leaves KillWait={KILL_WAIT_S} s at most" in text) == ("WARN", True)
    assert "--checkpoint.every_minutes 5" in text
    large = looked(here, tmp_path, "--partition", "lowc", "--preset", "gpt2-774m", code=None)  # a small disk is missing
    state, text = large["preemption"]
    assert (state, "PreemptMode=CANCEL" in text, "GraceTime=30 s, and a save takes about 31 s" in text) == (
        "WARN",
        True,
        True,
    )


def test_a_site_profile_with_every_mistake(here: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: lwo\nimage: /nowhere/gpt2hpc.sif\nbinds: [/nowhere/at/all]\nenvironment: {NCCL_SOCKET_IFNAME: nosuch}\n"
    )
    found = looked(here, tmp_path, "--site", str(site), code=8)
    assert found["site profile"] == ("OK", str(site))
    assert found["partition"][1].startswith("lwo does not exist; did you mean low? there are main, low,")
    assert (found["partition"][0], found["sbatch"][0], found["image"][0]) == ("MISSING",) * 3
    assert "invalid partition specified: lwo" in found["sbatch"][1]
    assert (found["NCCL_SOCKET_IFNAME"][0], found["binds"][0]) == ("WARN", "WARN")
    site.write_text("partition: main\nconstraint: a100\ngpus_per_node: 12\ntime: 12 hours\n")
    found = looked(here, tmp_path, "--site", str(site), code=8)
    assert found["GPUs of nodes"] == ("MISSING", "12 a node are asked for, and nodes of main have 8 at most")
    assert found["constraint"] == ("MISSING", "a100 is no feature of a node of main; they have no features")
    assert (found["time limit"][0], found["sbatch"][0]) == ("MISSING", "MISSING")
    site.write_text("partitoin: main\n")
    found = looked(here, tmp_path, "--site", str(site), code=8)
    assert (found["site profile"][0], "did you mean partition?" in found["site profile"][1]) == ("MISSING", True)
    assert found["slurm"][0] == "OK", "the rest is looked at all the same"


def test_a_profile_that_fits(here: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partition: low\naccount: proj42\ngpus_per_node: 4\ncpus_per_task: 1\ntime: 24:00:00\n")
    found = looked(here, tmp_path, "--site", str(site), "--nodes", "2")
    told = "--nodes=2 --partition=low --account=proj42 --time=24:00:00 --cpus-per-task=1 --gpus-per-node=4"
    assert found["sbatch"] == ("OK", f"would take a job with {told}")
    assert found["GPUs of nodes"] == ("OK", "4 of 8 a node")


def test_on_a_node_that_computes(cluster: Cluster, here: dict[str, str], tmp_path: Path) -> None:
    """In a job with GPUs that are there in Slurm's books alone, which no other test preempts."""
    srun = ["srun", "--partition=main", "--gpus-per-node=2", "--cpus-per-task=1", *DOCTOR, "--json"]
    done = subprocess.run(srun, env=here, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 8, done.stderr
    found = {each["name"]: (each["state"], each["text"]) for each in json.loads(done.stdout)}
    assert (found["GPUs"][0], found["GPUs"][1].startswith("this job has GPUs, but")) == ("MISSING", True)
    assert found["partition"] == ("OK", "main, 8 nodes")
    assert found["cores"][0] == "WARN"
    assert "sbatch" not in found
    jobs = cluster.run("squeue", "-h", "-t", "all", "-o", "%j %Z").splitlines()  # jobs of other tests are there too
    own = [name for name, _, folder in (job.partition(" ") for job in jobs) if folder == str(tmp_path)]
    assert len(own) == 1, f"nothing was submitted but the job of srun: {own}"


def test_without_slurm_on_path(here: dict[str, str], tmp_path: Path) -> None:
    env = {**here, "PATH": f"{Path(sys.executable).parent}"}
    code, page = on_terminal([*DOCTOR], env, tmp_path)
    assert code == (8 if "\nMISSING" in page else 0)
    assert section(page, "Slurm").startswith("WARN    slurm: sbatch is not on PATH, so `gpt2hpc submit` trains here; ")
    assert "What a job would ask for" not in page
    assert page.startswith("gpt2hpc ")
    assert "without a Slurm\n" in page


def test_a_slurm_that_does_not_answer(here: dict[str, str], tmp_path: Path) -> None:
    found = looked({**here, "SLURM_CONF": "/nowhere/slurm.conf"}, tmp_path, code=8)
    assert found["slurm"][0] == "MISSING"
    assert found["slurm"][1].startswith("SLURM_CONF=/nowhere/slurm.conf is not a file")
    conf = Path(here["SLURM_CONF"]).read_text()
    lost = re.sub("SlurmctldPort=.*", "SlurmctldPort=1", conf).replace("MessageTimeout=30", "MessageTimeout=5")
    (tmp_path / "slurm.conf").write_text(lost)
    found = looked({**here, "SLURM_CONF": str(tmp_path / "slurm.conf")}, tmp_path, code=8)
    assert (found["slurm"][0], "does not answer" in found["slurm"][1]) == ("MISSING", True)
    assert found["tokenizer"][0] == "OK"


# Machines that something is wrong with --------------------------------------------------------------------------


def mounted(folder: Path, options: str) -> str:
    """Shell that mounts a small memory disk there, which is gone with the doctor."""
    folder.mkdir()
    return f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))} || exit 77"


def looked_apart(env: dict[str, str], folder: Path, before: str, *flags: str, code: int) -> dict[str, tuple[str, str]]:
    """The same, where what is mounted by `before` is seen by the doctor alone."""
    inner = f"{before}\nexec {shlex.join([*DOCTOR, '--json', *flags])}"
    command = ["unshare", "--mount", "bash", "-c", inner]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode in (1, 77) and "mount" in done.stderr + done.stdout:
        pytest.skip(f"no mounting here: {done.stderr}")
    return findings(done, code)


def test_a_disk_without_room(here: dict[str, str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    found = looked_apart(
        here, tmp_path, mounted(disk, "size=64m,nr_inodes=200"), "--run-dir", str(disk / "run"), code=8
    )
    assert found["run directory"][0] == "OK"
    assert (found["space"][0], "has 0.1 GB free, but checkpoints of 1.5 GB each" in found["space"][1]) == (
        "MISSING",
        True,
    )
    assert (found["files"][0], "can be made here" in found["files"][1]) == ("MISSING", True)
    assert (found["file system"][0], f"on tmpfs ({disk})" in found["file system"][1]) == ("WARN", True)


def test_a_disk_that_is_full_and_one_that_is_read_only(here: dict[str, str], tmp_path: Path) -> None:
    full, locked = tmp_path / "full", tmp_path / "locked"
    fill = f"{mounted(full, 'size=1m')}\nhead -c 2M /dev/zero > {full}/filler 2>/dev/null"
    found = looked_apart(here, tmp_path, fill, "--run-dir", str(full), code=8)
    assert (found["run directory"][0], "No space left on device" in found["run directory"][1]) == ("MISSING", True)
    found = looked_apart(here, tmp_path, mounted(locked, "size=1m,ro"), "--run-dir", str(locked / "a" / "b"), code=8)
    assert (found["run directory"][0], "Read-only file system" in found["run directory"][1]) == ("MISSING", True)
    assert not (locked / "a").exists()


def test_scratch_that_runs_nothing(here: dict[str, str], tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    env = {**here, "TMPDIR": str(scratch)}
    found = looked_apart(env, tmp_path, mounted(scratch, "size=64m,noexec"), code=0)
    assert (found["scratch"][0], "noexec" in found["scratch"][1]) == ("WARN", True)
    found = looked({**here, "TMPDIR": "/nowhere/at/all"}, tmp_path, code=8)
    assert found["scratch"][0] == "MISSING"


def test_low_limits_of_the_shell(here: dict[str, str], tmp_path: Path) -> None:
    found = looked(here, tmp_path, before="ulimit -Sn 200; ulimit -f 1000; ulimit -t 7200", code=8)
    assert (found["open files"][0], found["open files"][1].startswith("200 at once")) == ("WARN", True)
    assert (found["file size"][0], found["CPU time"][0]) == ("MISSING", "WARN")
    assert looked(here, tmp_path)["open files"][0] == "OK"


def test_a_locale_and_packages_that_leak_in(here: dict[str, str], tmp_path: Path) -> None:
    known = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    path = f"{tmp_path}:{here.get('PYTHONPATH', '')}"
    found = looked({**here, **known, "PYTHONPATH": path}, tmp_path)
    assert found["PYTHONPATH"][1].startswith(path)
    assert (found["PYTHONPATH"][0], found["locale"][0]) == ("WARN", "WARN")
