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

from gpt2hpc import durable
from gpt2hpc.cluster import liveness
from gpt2hpc.cluster.launch import LocalJob
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
    """Be found by `find`."""
    run, pid = job.run, os.getpid()
    own = Supervisor(job.job, socket.gethostname(), pid, liveness.process_identity(pid), job.nproc)
    durable.publish_json(run.supervisor, dataclasses.asdict(own))
    try:
        with liveness.heartbeat(run.supervisor.with_suffix(".beat")):
            yield
    finally:
        with contextlib.suppress(OSError):
            run.supervisor.unlink()


def find(run: RunDir) -> Supervisor | None:
    """The one that is at work on the run; None where there is none. On another machine, by the age of its last sign of life."""
    with contextlib.suppress(TypeError, ValueError, OSError):
        facts = durable.read_json(run.supervisor)
        found = Supervisor(**facts) if facts else None
        if found is not None and _lives(run, found):
            return found
    return None


def refuse_another(run: RunDir) -> None:
    """Raise RunDirError where one is at work."""
    if (other := find(run)) is not None:
        raise RunDirError(
            f"--run-dir={run.path} is in use by job {other.job} (pid {other.pid} on {other.host}); wait for it, stop it with "
            f"`gpt2hpc stop {run.quoted}`, or choose another --run-dir"
        )


def _lives(run: RunDir, supervisor: Supervisor) -> bool:
    if liveness.is_here(supervisor.process):
        return liveness.process_identity(supervisor.pid) == supervisor.process
    return time.time() - run.supervisor.with_suffix(".beat").stat().st_mtime < 6 * liveness.BEAT_S
