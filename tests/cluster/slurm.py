"""A real Slurm on this machine: munged, slurmctld and a few slurmd in a directory of their own.

    python -m tests.cluster.slurm up DIR      # then: export SLURM_CONF=DIR/slurm.conf
    python -m tests.cluster.slurm down DIR

The nodes n1, n2, … are slurmd processes with 4 CPUs and 8 fake GPUs each. Partitions: `main` (not preempted), `low` (requeued
after a grace of 30 s), `low0` (no grace), `lowc` (cancelled after the grace), and `high`, which preempts those.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
KILL_WAIT_S = 20
_NUMBERS = itertools.count()
"""Of the clusters that this process has started."""
CONF = """
ClusterName=kit
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/{task}
MpiDefault=none
JobSubmitPlugins=lua
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=200000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait_s}
MinJobAge=3600
MaxArraySize=9
ReturnToService=2
SlurmdTimeout=30
MessageTimeout=30
BatchStartTimeout=60
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname=localhost Port=[{ports[1]}-{last_port}] CPUs=4 RealMemory=4000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 DefaultTime=30
PartitionName=low0 Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 DefaultTime=30
PartitionName=lowc Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=30 DefaultTime=30
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=30
"""
CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
"""
JOB_SUBMIT_LUA = """
function slurm_job_submit(job, partitions, uid)
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid)
  if record.name == "stubborn" then
    slurm.log_user("this cluster does not let you change that")
    return slurm.ERROR
  end
  return slurm.SUCCESS
end
return slurm.SUCCESS
"""
"""A cluster may forbid changes to a job: here to those named `stubborn`, whose --no-requeue is then final."""


def lacking() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [name for name in PROGRAMS if _program(name) is None]
    return f"{', '.join(missing)} not installed (`make slurm-install` on Debian and Ubuntu)" if missing else None


@dataclass(frozen=True)
class Cluster:
    """Its directory holds configuration, state, logs and the pids of its daemons; `prefix` begins each command, to enter a network."""

    directory: Path
    prefix: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """What a user of this cluster has in the environment; nothing of a job that we may be in."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        return {**own, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def start(self, *, nodes: int = 4, proctrack: str | None = None, conf: str = "") -> None:
        """Write the configuration, with the lines of `conf` after the usual ones; start the daemons, wait until every node is idle."""
        shutil.rmtree(self.directory, ignore_errors=True)
        (self.directory / "state").mkdir(parents=True)
        self.directory.chmod(0o755)
        proctrack = proctrack or best_proctrack()
        ports = _free_ports(nodes + 1)
        task = "cgroup" if proctrack == "cgroup" else "none"
        text = CONF.format(
            directory=self.directory,
            ports=ports,
            last_port=ports[-1],
            nodes=nodes,
            # cgroups are named by node and job, on a machine of several Slurms
            first_job=1 + 1000 * (os.getpid() % 60_000) + 500 * (next(_NUMBERS) % 2),
            proctrack=proctrack,
            task=task,
            kill_wait_s=KILL_WAIT_S,
        )
        (self.directory / "slurm.conf").write_text(text + conf)
        (self.directory / "cgroup.conf").write_text(
            CGROUP_CONF if proctrack == "cgroup" else "CgroupPlugin=cgroup/v1\n"
        )
        (self.directory / "job_submit.lua").write_text(JOB_SUBMIT_LUA)
        for number in range(8):
            (self.directory / f"gpu{number}").touch()
        (self.directory / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.directory}/gpu[0-7]\n")
        try:
            self._start_munge()
            self._daemon("slurmctld", "slurmctld", "-D")
            for number in range(1, nodes + 1):
                (self.directory / f"spool.n{number}").mkdir()
                self._daemon(f"slurmd.n{number}", "slurmd", "-D", "-N", f"n{number}")
            self._wait_until_idle(nodes)
        except BaseException:
            self.stop()
            raise

    def _start_munge(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        options = {
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge.seed",
        }
        self._daemon(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(f"--{option}={self.directory / name}" for option, name in options.items()),
        )
        _until(lambda: (self.directory / "munge.socket").exists(), 20, "munged does not listen")

    def _daemon(self, name: str, *command: str) -> None:
        program = _program(command[0])
        assert program is not None, command[0]
        with (self.directory / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(
                [*self.prefix, program, *command[1:]],
                env={**self.environment, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with (self.directory / "pids").open("a") as pids:
            pids.write(f"{process.pid} {_started(process.pid)} {name}\n")

    def _wait_until_idle(self, nodes: int) -> None:
        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False).split()
            return states == ["idle"] * nodes

        _until(idle, 240, f"the nodes of {self.directory} do not come up; see its logs")

    def stop(self) -> None:
        """End the daemons that `start` began, and what is left of their jobs' steps."""
        if not (self.directory / "pids").exists():
            return
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if jobs := self.run("squeue", "-h", "-o", "%A", check=False).split():
                self.run("scancel", "--signal=KILL", "--full", *set(jobs), check=False)
                self.run("scancel", *set(jobs), check=False)
                _until(lambda: not self.run("squeue", "-h", check=False), 30, "jobs do not end")
        for line in reversed((self.directory / "pids").read_text().splitlines()):
            pid, started, _ = line.split()
            _end(int(pid), started)
        (self.directory / "pids").unlink()

    def lose(self, node: str) -> None:
        """Kill a node's daemon and all that runs there, as when its power goes."""
        lines = (self.directory / "pids").read_text().splitlines()
        pid, started = next(line.split()[:2] for line in reversed(lines) if line.endswith(f" slurmd.{node}"))
        tasks = [pid for pid, env in _environments() if f"SLURMD_NODENAME={node}" in env and self._is_ours(env)]
        parents = {parent for task in tasks if (parent := _parent(task)) and "slurmstepd" in _name(parent)}
        _end(int(pid), started, signal.SIGKILL)
        for process in [*parents, *tasks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def ranks(self, job: str) -> dict[int, int]:
        """The process of each rank of a job that runs here, whatever its node."""
        found = {}
        for pid, env in _environments():
            ours = self._is_ours(env) and f"SLURM_JOB_ID={job}" in env and "gpt2hpc.train" in _words(pid)
            if ours and "slurmstepd" in _name(_parent(pid) or 0):  # and no child of a rank's
                found[int(next(each for each in env if each.startswith("SLURM_PROCID=")).split("=")[1])] = pid
        return found

    def batch_shell(self, job: str) -> int:
        """The process of a job's batch script that runs here."""
        return next(
            pid
            for pid, env in _environments()
            if self._is_ours(env)
            and f"SLURM_JOB_ID={job}" in env
            and "slurm_script" in _words(pid)[1:2][0]
            and "slurmstepd" in _name(_parent(pid) or 0)
        )

    def bring_back(self, node: str) -> None:
        self._daemon(f"slurmd.{node}", "slurmd", "-D", "-N", node)

    def _is_ours(self, env: Sequence[str]) -> bool:
        return f"SLURM_CONF={self.directory / 'slurm.conf'}" in env

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """Run a command as a user of this cluster; returns its standard output."""
        done = subprocess.run(
            [*self.prefix, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )  # type: ignore[call-overload]
        assert not check or done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return str(done.stdout).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job).splitlines()[0]))


def best_proctrack() -> str:
    """`cgroup` where this machine lets slurmd use cgroup v1, as production clusters do; else `linuxproc`. KIT_PROCTRACK wins."""
    freezer = Path("/sys/fs/cgroup/freezer")
    if chosen := os.environ.get("KIT_PROCTRACK"):
        return chosen
    return "cgroup" if freezer.is_dir() and os.access(freezer, os.W_OK) else "linuxproc"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on, below the range that the kernel hands out; apart from those of a process that looks
    at the same moment."""
    for first in range(20_000 + os.getpid() * 16 % 8000, 32_000 - count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise OSError("no free ports")


def _until(happened: object, seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.2)


def _started(pid: int) -> str:
    """When the process began, in clock ticks since boot: with the pid it names one process only."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return "gone"


def _environments() -> Iterator[tuple[int, list[str]]]:
    """Each process with its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(path.name), (path / "environ").read_text(errors="replace").split("\0")


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def _words(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def _end(pid: int, started: str, *signals: int) -> None:
    """TERM, then KILL, or just these; reap it if it is ours."""
    for number in signals or (signal.SIGTERM, signal.SIGKILL):
        seconds = 10 if number == signal.SIGTERM else 5
        if _started(pid) != started:
            return
        os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while _started(pid) == started and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)


@contextlib.contextmanager
def running(directory: Path, *, nodes: int = 4, conf: str = "") -> Iterator[Cluster]:
    cluster = Cluster(directory)
    cluster.start(nodes=nodes, conf=conf)
    try:
        yield cluster
    finally:
        cluster.stop()


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("up", "down"):
        print(__doc__, file=sys.stderr)
        return 2
    cluster = Cluster(Path(arguments[1]).absolute())
    if arguments[0] == "down":
        cluster.stop()
        return 0
    if reason := lacking():
        print(f"no Slurm here: {reason}", file=sys.stderr)
        return 8
    cluster.stop()
    cluster.start()
    print(f"Slurm is up (proctrack/{best_proctrack()}). To use it: export SLURM_CONF={cluster.directory}/slurm.conf")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
