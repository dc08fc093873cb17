"""Who starts the ranks of a local run, from before its first attempt until after its last: to be found from another terminal.

Between two attempts no rank lives that could be asked. So whoever starts them says so in `attempts/supervisor.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc import durable
from gpt2hpc.cluster import liveness
from gpt2hpc.cluster.launch import LocalJob
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.errors import RunDirError
from gpt2hpc.run_dir import RunDir


@dataclass(frozen=True)
class Supervisor:
    """The process `pid` on `host` starts `nproc` ranks as `job`; `process` tells it from any other."""

    job: str
    host: str
    pid: int
    process: str
    nproc: int


@contextlib.contextmanager
def announced(job: LocalJob) -> Iterator[None]:
    """Be found by `find`. Of two that start at once the ledger sends one away, which leaves the other announced."""
    run, pid = job.run, os.getpid()
    own = Supervisor(job.job, socket.gethostname(), pid, liveness.process_identity(pid), job.nproc)
    other = find(run)
    durable.publish_json(run.supervisor, dataclasses.asdict(own))
    try:
        with liveness.heartbeat(_beat(run), stays=True):
            yield
    finally:
        with contextlib.suppress(OSError):
            _withdraw(run, own, other)


def _withdraw(run: RunDir, own: Supervisor, other: Supervisor | None) -> None:
    """Be found no more; the `other`, whose announcement this one's has replaced, is again if it lives."""
    if _announced(run) != own:
        return
    if other is not None and _seems_alive(run, other):
        durable.publish_json(run.supervisor, dataclasses.asdict(other))
        return
    run.supervisor.unlink()
    _beat(run).unlink(missing_ok=True)


def find(run: RunDir) -> Supervisor | None:
    """The one that is at work on the run; None where there is none. On another machine, by the age of its last sign of life."""
    found = _announced(run)
    return found if found is not None and _seems_alive(run, found) else None


def refuse_another(run: RunDir, job: str) -> None:
    """Raise RunDirError where another job than that is at work on the run: an attempt lives, or, between two of them, who starts them.

    `job` is empty for one that has no number yet. What is on another machine lives where its signs of life go on while this watches.
    """
    Ledger(run).refuse_if_taken(job, 0)
    other = _announced(run)
    if other is not None and (
        _lives_here(other) if liveness.is_here(other.process) else liveness.is_beating(_beat(run))
    ):
        raise RunDirError(
            f"--run-dir={run.path} is in use by job {other.job} (pid {other.pid} on {other.host}); wait for it, stop it with "
            f"`gpt2hpc stop {run.quoted}`, or choose another --run-dir"
        )


def _announced(run: RunDir) -> Supervisor | None:
    """The last one, whether it lives or not."""
    with contextlib.suppress(TypeError, ValueError, OSError):
        facts = durable.read_json(run.supervisor)
        return Supervisor(**facts) if facts else None
    return None


def _seems_alive(run: RunDir, supervisor: Supervisor) -> bool:
    if liveness.is_here(supervisor.process):
        return _lives_here(supervisor)
    with contextlib.suppress(OSError):
        return time.time() - _beat(run).stat().st_mtime < 6 * liveness.BEAT_S
    return False


def _lives_here(supervisor: Supervisor) -> bool:
    return liveness.process_identity(supervisor.pid) == supervisor.process


def _beat(run: RunDir) -> Path:
    return run.supervisor.with_suffix(".beat")
