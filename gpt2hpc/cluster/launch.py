"""Ranks on this machine: started together, ended together.

What srun does on Slurm, for a workstation: one process a rank, kill-on-bad-exit, signals passed on. It is used by
`gpt2hpc train` and by `gpt2hpc submit --cluster local`. The ranks meet at a file, so no port can clash.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from gpt2hpc import cli
from gpt2hpc.cluster import dist_env
from gpt2hpc.cluster.signals import SIGNALS
from gpt2hpc.run_dir import RunDir

POLL_S = 0.1
SURVIVORS_GRACE_S = 10.0
"""How long the other ranks may take to notice that one has died, before they are killed."""
KILL_WAIT_S = 30.0
"""How long after the end of its time a job is killed, as Slurm's KillWait."""


@dataclass(frozen=True)
class LocalJob:
    """What to start: `command` once a rank; `time_limit_s` for each attempt; `gpus` on this machine."""

    command: tuple[str, ...]
    run: RunDir
    nproc: int
    job: str
    gpus: int = 0
    time_limit_s: float | None = None

    def environment(self, rank: int, *, restart: int, rendezvous: str, job_end: float | None) -> dict[str, str]:
        """What a rank gets beside the caller's environment."""
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.nproc),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, allowed_cores() // self.nproc)),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME") or loopback(),
            dist_env.JOB: self.job,
            dist_env.RESTART: str(restart),
            dist_env.RENDEZVOUS: rendezvous,
            dist_env.LAUNCHER_PID: str(os.getpid()),
        }
        if self.gpus:
            variables[dist_env.GPUS_ALLOTTED] = str(self.gpus)
        if job_end is not None:
            variables[dist_env.JOB_END] = f"{job_end:.3f}"
        return variables


@dataclass
class SignalRelay:
    """Passes this process's signals to the ranks, and remembers what they mean for the launcher.

    USR1 and USR2 are preemptions: the ranks save and stop, and a supervisor starts them again. TERM is one too, but
    then the launcher itself should go. INT (Ctrl-C) is the user's wish to stop; the second one kills.
    """

    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    last_attempt: bool = False
    interrupts: int = 0
    notice: str = "stopping after this step and saving; Ctrl-C again kills"
    """What the first Ctrl-C is answered with."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[SignalRelay]:
        before = {number: signal.signal(number, self._relay) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _relay(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
            word = "killing" if self.interrupts > 1 else self.notice
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), f"{word}\n".encode())  # print() must not be entered while it is printing
        self.last_attempt |= number in (signal.SIGINT, signal.SIGTERM)
        kill = number == signal.SIGINT and self.interrupts > 1
        self.send(signal.SIGKILL if kill else number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep signals waiting, so that none falls between starting a rank and knowing it. The ranks inherit this."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def send(self, number: int) -> None:
        """Signal the ranks that are alive."""
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)


def run_attempt(job: LocalJob, *, restart: int, relay: SignalRelay) -> int:
    """Start the ranks and wait until all have ended; returns 0 or the exit code of the first that failed.

    A rank that a signal killed counts as 128 + signal. Rank 0 shares this terminal; the others write to `logs/`.
    """
    job_end = time.time() + job.time_limit_s if job.time_limit_s else None
    folder = tempfile.mkdtemp(prefix="gpt2hpc-")
    try:
        with relay.held():
            for rank in range(job.nproc):
                variables = job.environment(rank, restart=restart, rendezvous=f"{folder}/store", job_end=job_end)
                relay.ranks.append(_start(job, restart, rank, variables))
            if relay.last_attempt:  # told so before there were ranks to tell
                relay.send(signal.SIGINT if relay.interrupts else signal.SIGTERM)
        return _wait(job, restart, relay, job_end)
    finally:
        relay.send(signal.SIGKILL)
        for process in relay.ranks:
            process.wait()
        relay.ranks.clear()
        shutil.rmtree(folder, ignore_errors=True)


def _start(job: LocalJob, restart: int, rank: int, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **variables}
    # A session of its own: Ctrl-C reaches the launcher only, which passes it on once.
    if rank == 0:
        return subprocess.Popen(job.command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    path = job.run.rank_log(job.job, restart, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as output:
        return subprocess.Popen(
            job.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(job: LocalJob, restart: int, relay: SignalRelay, job_end: float | None) -> int:
    failed: int | None = None
    kill_at: float | None = None
    is_over = False
    while any(process.poll() is None for process in relay.ranks):
        time.sleep(POLL_S)
        if failed is None and (failed := _first_failed(relay.ranks)) is not None:
            kill_at = time.time() + SURVIVORS_GRACE_S
        if job_end is not None and kill_at is None and time.time() > job_end:
            cli.warn(f"the time limit of {job.time_limit_s:.0f} s is over; the ranks are killed in {KILL_WAIT_S:.0f} s")
            relay.send(signal.SIGTERM)
            is_over, kill_at = True, job_end + KILL_WAIT_S
        if kill_at is not None and time.time() > kill_at:
            relay.send(signal.SIGKILL)
    failed = _first_failed(relay.ranks) if failed is None else failed
    if failed is None:
        return 0
    code = relay.ranks[failed].returncode
    _show_log(job.run.rank_log(job.job, restart, failed), failed)
    if code < 0 and not (is_over or relay.last_attempt):  # not by this process
        why = ", as the kernel does where memory runs out" if -code == signal.SIGKILL else ""
        cli.warn(f"rank {failed} was killed by signal {-code}{why}")
    return code if code > 0 else 128 - code


def _first_failed(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """A rank that ended badly; one that a signal killed rather than those that followed it."""
    bad = [(process.returncode >= 0, rank) for rank, process in enumerate(ranks) if process.poll()]
    return min(bad)[1] if bad else None


def _show_log(path: Path, rank: int) -> None:
    """The end of what a failed rank printed; rank 0's is on the terminal already."""
    if rank and path.exists():
        tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        print(f"--- rank {rank}, {path}", *tail, sep="\n", file=sys.stderr, flush=True)


def allowed_cores() -> int:
    """Cores this process may use, not those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loopback() -> str:
    return "lo" if sys.platform.startswith("linux") else "lo0"


def count_gpus() -> int:
    """GPUs that a process here would see, without importing torch: CUDA_VISIBLE_DEVICES, else nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
