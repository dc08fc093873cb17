"""What this attempt saves: named, written beside the steps, noted in the ledger, pruned, uploaded, reported."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from gpt2hpc.cluster.ledger import Attempt, Ledger
from gpt2hpc.config import Config
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, uploads
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.metrics import MetricsLog
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.saver import Order, RankState, Saver, Tensors
from gpt2hpc.training.stop import Clock
from gpt2hpc.training.uploader import Uploader

END_S = 20.0
"""Of a job, in which its last process ends in order."""


class Saves:
    """Every rank has one, and calls it at the same steps.

    Args:
        run: Where the checkpoints are.
        config: Settings of the run.
        ranks: This process among its peers.
        ledger: Fences what is written.
        attempt: This attempt.
        clock: Is told how long saves take.
        say: Prints a line; a no-op on ranks other than 0.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        *,
        ranks: Ranks,
        ledger: Ledger,
        attempt: Attempt,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._config, self._ranks, self._clock, self._say = run, config, ranks, clock, say
        self._ledger, self._attempt = ledger, attempt
        self._saver = Saver(
            ranks,
            attempt=attempt.number,
            fence=lambda: ledger.fence(attempt),
            all_have_all=not config.train.shard_optimizer,
        )
        repo = config.checkpoint.repo
        self._uploader = Uploader(run, repo, say) if repo is not None and ranks.is_first else None
        self.resumed_from: Checkpoint | None = None
        self._started = ""
        self.step: int | None = None
        """The last one that is saved, or being saved."""

    def resumed(self, found: Checkpoint | None, *, started: str) -> None:
        """What the attempt went on from; `started` names the checkpoints of a run that has none yet."""
        self.resumed_from, self._started = found, started
        if self._uploader is not None:
            self._uploader.published()  # by the attempts before: one that is stopped often has no time for it
        if found is not None and found.path.parent == self._run.checkpoints:
            self.step, self._started = found.step, found.started  # it may have begun on another cluster

    def prepare(self, state: Tensors) -> None:
        """Make room for copies, beside the steps."""
        self._saver.prepare(state)

    def begin(
        self, step: int, state: Tensors, rank_state: RankState, facts: Mapping[str, Any], log: MetricsLog
    ) -> None:
        """Copy the state and have it written; waits for the save before."""
        began = time.perf_counter()
        self.settle(log)
        name = checkpoint.name(started=self._started, tag=self._config.model.tag, step=step)
        target = self._run.checkpoints / name
        order = Order(target, rank_state, facts, texts=log.put_on_disk(step), published=self._published)
        self._clock.begins_to_save()
        self._saver.begin(state, order, waited_s=time.perf_counter() - began)
        self.step = step

    @property
    def is_under_way(self) -> bool:
        return self._saver.is_saving

    @property
    def has_failed(self) -> bool:
        return self._saver.has_failed

    def report(self, log: MetricsLog) -> None:
        """Say and log what was published since the last time."""
        if saved := self._saver.finished():
            self._clock.took("save", saved.seconds)
            log.save(saved.checkpoint.step, seconds=saved.seconds, stall_s=saved.stall_s, size=saved.bytes)
            self._say(str(saved))

    def settle(self, log: MetricsLog) -> None:
        """Wait for the save under way, and report it; raises what went wrong with it, on every rank."""
        self._saver.wait()
        self.report(log)

    def abandon(self) -> None:
        """After an error: leave nothing under way."""
        self._saver.abandon()

    def end_uploads(self, *, wait: bool, is_told_to_end: Callable[[], bool]) -> None:
        """The end of the attempt, on rank 0: with `wait` upload what is left, as long as the job has time and nobody ends it."""
        if self._uploader is not None:
            wait_s, end = self._config.checkpoint.upload_wait_s, self._ranks.env.job_end
            if end is not None:
                wait_s = min(wait_s, end - time.time() - END_S)
            self._uploader.close(max(0.0, wait_s) if wait else 0.0, is_told_to_end)

    def _published(self, saved: Checkpoint) -> None:
        """A checkpoint is there: on rank 0, beside the steps."""
        self._ledger.note(self._attempt, saved_step=saved.step)
        keep = {self.resumed_from.path} if self.resumed_from else set()
        try:
            keep |= uploads.leased(self._run)
            begins = self._config.decay_begins  # from there a run may be lengthened
            keep |= {each.path for each in checkpoint.found(self._run.checkpoints) if each.step == begins}
            checkpoint.prune(self._run.checkpoints, saved_step=saved.step, config=self._config.checkpoint, keep=keep)
        except OSError as error:
            self._say(f"warning: older checkpoints could not be deleted, and stay: {error}")
        shutil.rmtree(self._run.fetched, ignore_errors=True)
        if self._uploader is not None:
            self._uploader.published()
