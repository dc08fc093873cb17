"""What of a run's checkpoints is on the Hub, what waits to go there, and what goes there now: files in `RUN/uploads/`.

    NAME.json       uploaded: to which repository, as which commit and manifest, when, bytes and seconds
    *.lease         being uploaded by a living process, which touches the file: not to be deleted now
    error.json      why the last try failed; gone once one succeeds
    sync.log        what the uploading processes of the training said

Whatever is complete on disk and not marked waits, so a killed process, a full disk or a removed checkpoint loses no account.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2hpc import durable
from gpt2hpc.cluster.ledger import utc_now
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint
from gpt2hpc.training.checkpoint import Checkpoint

TOUCH_S, FRESH_S = 10.0, 120.0
LOG = "sync.log"
_ERROR = "error.json"


@dataclass(frozen=True)
class Uploaded:
    """`NAME.json`: a checkpoint that is on the Hub; `manifest_sha256` tells it from another one by the same name."""

    repo: str
    commit: str
    manifest_sha256: str
    uploaded_at: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """`error.json`."""

    reason: str
    at: str


@dataclass(frozen=True)
class Lag:
    """How far the Hub is behind the run directory; `behind` in steps, None if nothing waits or nothing is there."""

    repo: str
    waiting: int
    uploaded_step: int | None
    behind: int | None
    error: str | None

    @property
    def line(self) -> str:
        if not self.waiting:
            return f"all on {self.repo}" if self.uploaded_step is not None else ""
        there = "nothing there yet" if self.uploaded_step is None else f"step {self.uploaded_step} is there"
        behind = f", {self.behind} steps behind" if self.behind else ""
        return f"{self.waiting} to upload to {self.repo}, {there}{behind}" + (f": {self.error}" if self.error else "")


def waiting(run: RunDir, repo: str) -> list[Checkpoint]:
    """Complete checkpoints that are not on the Hub as they are here, the furthest first; whether they are whole is not asked."""
    return [
        found
        for found in checkpoint.found(run.checkpoints)
        if (sha256 := found.manifest().get("sha256")) and not _is_marked(run, found, repo, sha256)
    ]


def unreadable(run: RunDir) -> list[Checkpoint]:
    """Of which not even the manifest is whole, so that nobody can tell whether they are on the Hub."""
    return [found for found in checkpoint.found(run.checkpoints) if not found.manifest()]


def _is_marked(run: RunDir, found: Checkpoint, repo: str, sha256: str) -> bool:
    mark = durable.read_json(run.uploads / f"{found.path.name}.json")
    return isinstance(mark, dict) and (mark.get("repo"), mark.get("manifest_sha256")) == (repo, sha256)


def mark(run: RunDir, found: Checkpoint, *, repo: str, commit: str, manifest_sha256: str, seconds: float) -> Uploaded:
    """Take it out of what waits, and what failed before with it."""
    size = sum(entry["bytes"] for entry in found.manifest().get("files", {}).values())
    done = Uploaded(repo, commit, manifest_sha256, utc_now(), size, round(seconds, 3))
    run.uploads.mkdir(parents=True, exist_ok=True)
    durable.publish_json(run.uploads / f"{found.path.name}.json", asdict(done))
    for name, path in _marks(run).items():  # of those that retention removed since; this one is further
        if Checkpoint(Path(name)).step < found.step and not (run.checkpoints / name).exists():
            path.unlink(missing_ok=True)
    return done


def _marks(run: RunDir) -> dict[str, Path]:
    """By the name of the checkpoint."""
    return {path.name.removesuffix(".json"): path for path in run.uploads.glob("*_step*.json")}


def _repo_of(path: Path) -> str | None:
    facts = durable.read_json(path)
    return facts.get("repo") if isinstance(facts, dict) else None


def fail(run: RunDir, reason: str) -> None:
    run.uploads.mkdir(parents=True, exist_ok=True)
    durable.publish_json(run.uploads / _ERROR, asdict(Failure(reason, utc_now())))


def succeed(run: RunDir) -> None:
    (run.uploads / _ERROR).unlink(missing_ok=True)


def failure(run: RunDir) -> Failure | None:
    """Why the last try failed, if it did."""
    with contextlib.suppress(TypeError):
        facts = durable.read_json(run.uploads / _ERROR)
        return Failure(**facts) if facts else None
    return None


def lag(run: RunDir, repo: str) -> Lag:
    """How far the Hub is behind."""
    waits = waiting(run, repo)
    steps = [Checkpoint(Path(name)).step for name, path in _marks(run).items() if _repo_of(path) == repo]
    there = max(steps, default=None)
    behind = max(0, waits[0].step - there) if waits and there is not None else None
    failed = failure(run)
    return Lag(repo, len(waits), there, behind, failed.reason if failed and waits else None)


@contextlib.contextmanager
def lease(run: RunDir, found: Checkpoint) -> Iterator[None]:
    """Keep a checkpoint from being deleted for as long as the block lasts, or this process lives."""
    run.uploads.mkdir(parents=True, exist_ok=True)
    path = run.uploads / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}.lease"
    durable.publish_text(path, found.path.name)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def leased(run: RunDir) -> set[Path]:
    """Checkpoints that are being uploaded: not to be deleted now. A killed process holds its own for two minutes."""
    leases = list(run.uploads.glob("*.lease"))
    if not leases:
        return set()
    clock = durable.temporary_name(run.uploads / "clock")  # the file system's, which another node's may differ from
    clock.touch()
    now = clock.stat().st_mtime
    clock.unlink()
    found = set()
    for path in leases:
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime < FRESH_S:
                found.add(run.checkpoints / path.read_text())
            else:
                path.unlink()
    return found
