"""How a start takes a run in hand: its settings are written, an attempt is claimed. What is refused before, `starting` refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from gpt2hpc import cli, config_io, starting
from gpt2hpc.cluster.dist_env import LOCAL, DistEnv
from gpt2hpc.cluster.ledger import Attempt, Cause, Ledger
from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.patience import LateError
from gpt2hpc.data.shards import AbsentError
from gpt2hpc.errors import NodeError, StoppedError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import writers


@dataclass(frozen=True)
class Opened:
    """A run that an attempt may work on; None of an attempt means that it is finished already."""

    config: Config
    manifest: Manifest
    attempt: Attempt | None
    run_started: str = ""


def is_finished(run: RunDir, config: Config) -> bool:
    """Whether there is nothing left to do, and say so."""
    ledger = Ledger(run)
    if not ledger.is_finished(config.train.steps):
        return False
    cli.say(f"{run.path} finished at step {ledger.finished_step()} already; raise train.total_steps to go on")
    return True


def settle(run: RunDir, config: Config) -> None:
    """Make `config` the settings of the run, and say which of them are new."""
    for key, (old, new) in config_io.changes(run, config).items():
        cli.note(f"the run goes on with another {key}: {new} instead of {old}")
    config_io.store(config, run.config)


@contextlib.contextmanager
def to_be_restarted(run: RunDir) -> Iterator[None]:
    """What is late, as from a Hub that is down, ends only the attempt of a run that has saved something."""
    try:
        yield
    except LateError as error:
        if not run.has_checkpoints:
            raise
        raise StoppedError(error.line) from error


@contextlib.contextmanager
def _seen_before(run: RunDir, config: Config, node: str) -> Iterator[None]:
    """What a run has trained on, and is not there, is there for other nodes: this one has not mounted it."""
    try:
        yield
    except AbsentError as error:
        if config.data.manifest_sha256 is None or not run.has_checkpoints:
            raise
        raise NodeError(f"{node} does not see the data that the run has trained on: {error.what}") from error


def open_run(run: RunDir, config: Config, env: DistEnv) -> Opened:
    """Check, claim an attempt, settle the settings: rank 0's part before anything is computed."""
    writers.check(config.train)
    with to_be_restarted(run), _seen_before(run, config, env.node):
        config, manifest = starting.check_start(run, config, world_size=env.world_size)
    starting.check_repo(config)
    run.create()
    if is_finished(run, config):
        return Opened(config, manifest, None)
    ledger = Ledger(run)
    attempt = ledger.claim(env)
    ledger.fence(attempt)
    settle(run, config)
    run.finished.unlink(missing_ok=True)
    has_launcher = env.launcher_pid is not None  # which knows whether a wish is old
    if _is_old(run) or (env.job.startswith(LOCAL) and env.restart == 0 and not has_launcher):
        run.stop.unlink(missing_ok=True)
    first = ledger.attempts()[0].started
    return Opened(
        config, manifest, attempt, first.replace("-", "").replace(":", "").replace("T", "-").removesuffix("Z")
    )


def _is_old(run: RunDir) -> bool:
    """Whether a wish to stop was there when the run ended; one that came later counts, and one that met an end to be followed by
    another start, as a preemption's."""
    outcome = Ledger(run).outcome()
    if outcome is not None and outcome.cause in (Cause.PREEMPTED, Cause.TIME_LIMIT):
        return False
    with contextlib.suppress(OSError):
        return run.stop.stat().st_mtime <= run.outcome.stat().st_mtime
    return False
