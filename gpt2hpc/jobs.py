"""What runs inside a job: picklable callables, by reference a few bytes, that import torch only when called."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2hpc import cli, durable, garbage, opening, starting
from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.dist_env import LOCAL, DistEnv
from gpt2hpc.cluster.ledger import Attempt, Cause, Ledger, Outcome
from gpt2hpc.cluster.signals import SignalFlag, Stop
from gpt2hpc.config import Config
from gpt2hpc.data import hub, verify
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.errors import USER_ERRORS, Gpt2hpcError, MissingError, NodeError, StoppedError, as_users
from gpt2hpc.opening import Opened
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.dumps import Dumps
from gpt2hpc.training.startup import StartUp
from gpt2hpc.training.watchdog import PREFLIGHT, Watchdog, collective_timeout, limits

if TYPE_CHECKING:
    from gpt2hpc.training.process_group import Ranks


SLOWEST_HASHING_BYTES_PER_S = 10e6
"""At which shards may be hashed, before that is taken for hung."""
UNSEEN_SETTINGS_S = 10.0
"""For which a rank waits for settings that it does not see; longer would delay the verdict on a node that never does."""


@dataclass(frozen=True)
class Train:
    """One rank of a training attempt.

    Args:
        run_dir: The run directory.
        config: Settings to begin or to go on with; None for those stored in the run directory.

    Returns 0 for every orderly end, a stop included: the outcome file tells which.
    """

    run_dir: str
    config: Config | None = None

    def __call__(self, signals: SignalFlag | None = None) -> int:
        if signals is None:
            signals = SignalFlag()
            signals.install()  # before the seconds that importing torch takes
        start_up = StartUp()
        env, run = DistEnv.from_env(os.environ), RunDir(Path(self.run_dir))
        with refusal_noted(run, env):
            require_torch()
            compile_cache.settle(os.environ, env)
            with garbage.unsought():
                from gpt2hpc.training import heap
                from gpt2hpc.training.process_group import joined, make_deterministic, select_device
            start_up.done("imports")
            config = self.config or _settings_here(run, env)
            if config.train.deterministic:
                make_deterministic()  # before NCCL reads its settings
            device = select_device(config.train.device, env)
            if device.type == "cpu" and config.train.micro_batch_size != "auto":
                heap.keep_freed()  # it comes to lie in pieces, so that no trial could foretell how much it takes
            start_up.done("device")
            with joined(env, device, collective_timeout(config)) as ranks:
                start_up.done("process group")
                opened = None
                with ranks.first_decides():
                    if ranks.is_first:
                        with refusal_noted(run, env):  # before the others are told, whose nodes are not to blame
                            opened = opening.open_run(run, config, env)
                opened = ranks.from_first(opened)
                start_up.done("settings")
                if opened.attempt is not None:
                    _run_attempt(opened, run, ranks, signals, start_up)
        return 0


@dataclass(frozen=True)
class Rank:
    """`Train` as a task of a batch job: what submitit pickles, by reference. The process ends with a documented exit code."""

    run_dir: str
    quiet: bool = False

    def __call__(self) -> int:
        if self.quiet:
            cli.be_quiet()
        code = cli.run(lambda argv: Train(self.run_dir)(), ())
        if code:
            sys.exit(code)  # submitit turns an exception into exit code 1
        return code


def _settings_here(run: RunDir, env: DistEnv) -> Config:
    """Those of the run. A rank whose node does not see the run directory gets as far as the preflight, which names that node."""
    patient_until = time.monotonic() + (0 if env.job.startswith(LOCAL) else UNSEEN_SETTINGS_S)
    while env.rank and not run.config.exists():
        if time.monotonic() > patient_until:
            return Config()
        time.sleep(1)
    return starting.stored_config(run)


def refuse_other_settings(ranks: Ranks, nodes: Sequence[str], ledger: Ledger, attempt: Attempt) -> None:
    """Raise NodeError where a rank did not see the run's settings in time, and began as the first one did not. Collective."""
    import torch

    ways = ranks.gather((torch.are_deterministic_algorithms_enabled(), ranks.device.type))
    with ranks.first_decides():
        suspects = tuple(sorted({node for node, way in zip(nodes, ways, strict=True) if way != ways[0]}))
        if ranks.is_first and suspects:
            ledger.note(attempt, suspects=suspects)
            raise NodeError(f"ranks on {', '.join(suspects)} did not see the run's config.yaml when they began")


@contextlib.contextmanager
def refusal_noted(run: RunDir, env: DistEnv) -> Iterator[None]:
    """Keep an error of the user's where the decision will find it: the exit codes of ranks that are ended for it may hide its own."""
    try:
        yield
    except Gpt2hpcError as error:
        newest = Ledger(run).newest()
        claimed = newest is not None and (newest.job, newest.restart) == (env.job, env.restart)
        is_final = isinstance(error, USER_ERRORS) and not isinstance(error, StoppedError)
        if is_final and env.is_launched and not claimed:
            Ledger(run).refuse(env.job, env.restart, error)
        if isinstance(error, NodeError) and not claimed:
            end = Cause.CRASHED, error.exit_code
            Ledger(run).close_for(env.job, env.restart, env.nodes, *end, suspects=(env.node,))
        raise


def require_torch() -> None:
    """Raise MissingError where training cannot start at all."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingError("torch is not installed, and this command needs it: pip install 'gpt2hpc[train]'")


def check_shards(run: RunDir, config: Config, manifest: Manifest, ranks: Ranks) -> None:
    """Hash, on rank 0, the shards that this run has not hashed yet; those that are copied or streamed are hashed when they come."""
    if hub.is_remote(manifest.where) or config.data.stage or not config.data.verify:
        return
    began = time.monotonic()
    hashed = ranks.first_works(lambda: verify.check(manifest, run.verified))
    if hashed and ranks.is_first:
        seconds = time.monotonic() - began
        cli.note(f"hashed {hashed / 1e6:,.1f} MB of shards in {seconds:.1f} s: as the manifest says")


def _run_attempt(opened: Opened, run: RunDir, ranks: Ranks, signals: SignalFlag, start_up: StartUp) -> None:
    """Train under a watchdog."""
    assert opened.attempt is not None
    nodes = ranks.gather(ranks.env.node)
    dumps = Dumps(run, Ledger(run), opened.attempt, ranks.rank, nodes)
    waits_for_shards = opened.config.data.stage or hub.is_remote(opened.manifest.where)
    watchdog = Watchdog(limits(opened.config, waits_for_shards=waits_for_shards), dumps)
    with watchdog.watching():
        _train(opened, run, ranks, signals, watchdog, nodes, start_up)


def _train(
    opened: Opened,
    run: RunDir,
    ranks: Ranks,
    signals: SignalFlag,
    watchdog: Watchdog,
    nodes: Sequence[str],
    start_up: StartUp,
) -> None:
    """Train, then write how it ended; rank 0 writes."""
    with garbage.unsought():
        import torch._dynamo  # noqa: F401 -- AdamW does, and its seconds are not the model's

        from gpt2hpc.training import screen
        from gpt2hpc.training.preflight import Preflight
        from gpt2hpc.training.trainer import Trainer
    start_up.done("imports")
    assert opened.attempt is not None
    ledger, attempt = Ledger(run), opened.attempt
    if ranks.is_first:  # how `gpt2hpc logs` finds it in a log of several
        cli.note(f"attempt {attempt.number}: job {attempt.job}, restart {attempt.restart}, on {attempt.nodes}")
    shown = screen.chosen(os.environ, is_first=ranks.is_first)
    trainer = None
    try:
        with opening.to_be_restarted(run), ledger.heartbeat(attempt, writes=ranks.is_first):
            with watchdog.phase(PREFLIGHT):
                Preflight(run, opened.config, opened.manifest, ranks, nodes, os.environ, watchdog.beat).check(
                    ledger, attempt
                )
                refuse_other_settings(ranks, nodes, ledger, attempt)
            start_up.done("preflight")
            with watchdog.phase("start", more_s=_bytes(opened.manifest) / SLOWEST_HASHING_BYTES_PER_S):
                check_shards(run, opened.config, opened.manifest, ranks)
                start_up.done("data check")
                watchdog.beat()
                trainer = Trainer(
                    opened.config,
                    opened.manifest,
                    run,
                    ranks=ranks,
                    ledger=ledger,
                    attempt=attempt,
                    run_started=opened.run_started,
                    signals=signals,
                    screen=shown,
                    watchdog=watchdog,
                    start_up=start_up,
                )
                trainer.start()
            stop = trainer.train()
            trainer.close()
    except (Gpt2hpcError, OSError) as caught:
        error = caught if isinstance(caught, Gpt2hpcError) else as_users(caught)
        if trainer:
            trainer.saves.abandon()  # what it notes in the ledger comes before the end
        if ranks.is_first and not isinstance(error, (StoppedError, NodeError)) and not ledger.superseded(attempt):
            step = trainer.step if trainer else 0
            with contextlib.suppress(OSError):  # a full disk; the exit code tells as well
                ledger.close(attempt, _outcome(attempt, Cause.ERROR, step, error.exit_code, error.line))
        raise error from caught
    finally:
        shown.close()
        if trainer:
            trainer.saves.abandon()
    with watchdog.phase("end", more_s=opened.config.checkpoint.upload_wait_s):
        if ranks.is_first:
            _close(ledger, run, attempt, stop, trainer.step)
            cli.say(_closing_line(run, stop, trainer.step))
        trainer.log.wait_for_writers()
        ended = lambda: signals.stop is not Stop.NO  # noqa: E731
        ranks.first_works(lambda: trainer.saves.end_uploads(wait=not stop, is_told_to_end=ended))
        ranks.barrier()  # so that no rank ends while another still works: the first exit ends the job
        trainer.store.remove()


def _bytes(manifest: Manifest) -> int:
    return sum(shard.bytes for shard in manifest.shards)


def _close(ledger: Ledger, run: RunDir, attempt: Attempt, stop: Stop, step: int) -> None:
    cause = stop.cause if stop else Cause.FINISHED
    if cause is Cause.FINISHED:
        ledger.fence(attempt)
        durable.publish_json(run.finished, {"step": step})
    ledger.close(attempt, _outcome(attempt, cause, step))


def _outcome(attempt: Attempt, cause: Cause, step: int, exit_code: int | None = None, message: str = "") -> Outcome:
    return Outcome(attempt.number, attempt.job, attempt.restart, cause, step, exit_code, message)


def _closing_line(run: RunDir, stop: Stop, step: int) -> str:
    if not stop:
        return f"finished at step {step}: {run.path}"
    if stop.name == "DIVERGED":
        return f"diverged at step {step}: the loss is not finite; nothing was saved since the last good checkpoint"
    return f"stopped at step {step} ({stop.cause}), checkpoint saved"
