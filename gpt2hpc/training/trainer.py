"""The loop: steps, reports, validation, saves and stops, from wherever the newest checkpoint left off."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from gpt2hpc import __version__, cli
from gpt2hpc.cluster.ledger import Attempt, Ledger
from gpt2hpc.cluster.signals import SignalFlag, Stop
from gpt2hpc.config import Config
from gpt2hpc.data.loader import Slice, TrainLoader, ValLoader
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.shards import Tokens
from gpt2hpc.data.store import open_store
from gpt2hpc.evaluation import examples
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import beginning, checkpoint, heap, metrics, startup, state, writers
from gpt2hpc.training.batches import to_device, trace
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.evaluations import Evaluations
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.metrics import MetricsLog
from gpt2hpc.training.micro_batch import MicroBatch
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.progress import Progress
from gpt2hpc.training.saves import Saves
from gpt2hpc.training.screen import Screen
from gpt2hpc.training.startup import StartUp
from gpt2hpc.training.stop import Agreement, Clock, Consensus, StopFile
from gpt2hpc.training.watchdog import STEP, Watchdog


class Trainer:
    """One attempt at a run, on one rank.

    Args:
        config: Settings of the run.
        manifest: The data.
        run: Where everything is written.
        ranks: This process among its peers.
        ledger: Fences what is written.
        attempt: This attempt.
        run_started: When the run's first attempt began, as `20260131-120000`; names its checkpoints.
        signals: What was signalled so far.
        screen: Shows steps and prints lines; nothing on ranks other than 0.
        watchdog: Is told of all progress.
        start_up: Is told of each phase until the first step is done.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        run: RunDir,
        *,
        ranks: Ranks,
        ledger: Ledger,
        attempt: Attempt,
        run_started: str,
        signals: SignalFlag,
        screen: Screen,
        watchdog: Watchdog,
        start_up: StartUp,
    ) -> None:
        self.run_dir, self.ranks = run, ranks
        self.say, self.show, self.watchdog, self.start_up = screen.say, screen.show, watchdog, start_up
        self.ledger, self.attempt, self.run_started, self.signals = ledger, attempt, run_started, signals
        self.resumed, self.identity = ranks.first_works(lambda: self._find(config))
        watchdog.beat()
        start_up.done("checkpoint")
        self.micro_batch = MicroBatch(config, run, ranks, resumed=self.resumed, say=screen.say, beat=watchdog.beat)
        self.config = config = self.micro_batch.config
        self.step = self.consumed = 0
        self._build(manifest)
        self.saves = Saves(run, config, ranks=ranks, ledger=ledger, attempt=attempt, clock=self.clock, say=screen.say)
        watchdog.spares(lambda: self.saves.is_under_way)
        start_up.done("model")

    def _build(self, manifest: Manifest) -> None:
        config = self.config
        self.learner = Learner(config, self.ranks, self.watchdog.beat)
        part = Slice(self.ranks.rank, self.ranks.world_size, config.train.rows, self.learner.grad_accum_steps)
        block_size, data = config.model.block_size, config.data
        self.store = open_store(
            manifest,
            data,
            os.environ,
            job=self.ranks.env.job,
            fetches=self.ranks.env.local_rank == 0,
            arrived=self.watchdog.stir,
        )
        self.val_loader = ValLoader(
            manifest, self.store, block_size=block_size, tokens=config.train.eval_tokens, part=part
        )
        self.loader = TrainLoader(
            manifest,
            self.store,
            block_size=block_size,
            seed=config.train.seed,
            shuffle_shards=data.shuffle_shards,
            part=part,
        )
        self.manifest_sha256 = manifest.sha256
        self.clock = Clock(config.checkpoint, self.ranks.env.job_end, state_bytes=config.state_bytes)
        self.stop_file, self.consensus = StopFile(self.run_dir.stop), Consensus()

    # Start ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the checkpoint if there is one, wrap the model, warm up, open the logs."""
        self.say(self._described())
        rank_state = self._resume()
        with self.ranks.first_decides():
            if self.ranks.is_first:
                checkpoint.check_space(
                    self.run_dir.checkpoints,
                    bytes_each=self.learner.state_bytes,
                    config=self.config.checkpoint,
                    resumed=self.saves.resumed_from,
                    decay_begins=self.config.decay_begins,
                )
        self.start_up.done("checkpoint")
        with self.micro_batch.watched():
            self.micro_batch.is_tried()
            self.learner.wrap()
            self.learner.warm_up()
            self._wait_for_device()
        self.start_up.done("warm-up")
        self.watchdog.beat()
        self._open_logs(rank_state)
        self.start_up.done("logs")

    def _open_logs(self, rank_state: state.RankState) -> None:
        """Cut the logs back to where the attempt goes on; from here on random numbers and steps are the run's."""
        questions = self._examples()
        logged = metrics.furthest(self.run_dir.metrics) if self.ranks.is_first else 0  # it is cut back next
        self.log = MetricsLog(
            self.run_dir if self.ranks.is_first else None,
            resumed_step=self.step,
            fence=lambda: self.ledger.fence(self.attempt),
            say=self.say,
            show=self.show,
        )
        for work, seconds in self.log.took():
            self.clock.took(work, seconds)
        if self.ranks.is_first:
            self.log.copy_to(writers.opened(self.run_dir, self.config.train, self.say))
        state.restore_rank_state(rank_state, self.ranks.device)  # after what others' libraries may have drawn
        self._first_step = self.step
        self.progress = Progress(self.config, self.ranks, self.log, step=self.step)
        self.evaluations = Evaluations(
            self.learner.model,
            self.config,
            ranks=self.ranks,
            precision=self.learner.precision,
            val_loader=self.val_loader,
            examples=questions,
            log=self.log,
            progress=self.progress,
            clock=self.clock,
            watchdog=self.watchdog,
        )
        if self.ranks.is_first:
            repeats = max(0, logged - self.step)
            self.ledger.note(self.attempt, first_step=self.step, saved_step=self.step, repeats=repeats)

    def _described(self) -> str:
        """What is about to run, for the log."""
        config, part = self.config, self.loader.part
        samples = config.train.steps * part.samples_per_step
        return (
            f"{config.model.parameters / 1e6:,.1f}M parameters; {cli.plural(part.world_size, 'rank')} on {self.ranks.device.type} in "
            f"{str(self.learner.precision.dtype).removeprefix('torch.')}; a step is {config.train.tokens_per_step:,} tokens = "
            f"{part.world_size} ranks × {part.grad_accum_steps} × {part.micro_batch_size} × {config.model.block_size}; "
            f"{config.train.steps:,} steps are {samples / self.loader.order.per_epoch:,.1f} epochs of the data"
        )

    def _resume(self) -> state.RankState:
        """Load what there is to go on from, if anything; returns the random generators to begin with."""
        found = self.resumed
        self.saves.resumed(found, started=self.run_started)
        these = self.config, self.ranks, self.learner, self.say
        begun = beginning.at_step_0(*these) if found is None else beginning.at(found, *these)
        self.step, self.consumed = begun.step, begun.consumed
        return begun.rank_state

    def _find(self, config: Config) -> tuple[Checkpoint | None, str]:
        self.ledger.fence(self.attempt)
        return beginning.find(self.run_dir, config, self.say)

    def _examples(self) -> list[examples.Example]:
        """HellaSwag's, read once for all ranks."""
        train, block_size = self.config.train, self.config.model.block_size
        if (source := train.hellaswag) is None:
            return []
        kept, limit = self.run_dir.hellaswag, train.hellaswag_examples
        return self.ranks.first_works(
            lambda: examples.fitted(examples.load_once(source, kept, limit=limit), block_size)
        )

    def close(self) -> None:
        self.log.close()
        self.store.close()

    # Steps ------------------------------------------------------------------------------------------------------

    def train(self) -> Stop:
        """Train to the end (Stop.NO) or to an agreed stop, with everything saved that should be."""
        with self.micro_batch.watched():
            return self._train()

    def _train(self) -> Stop:
        self.learner.model.train()
        self.evaluations.run_due(self.step)
        self.start_up.done("validation")
        agreed, steps = Agreement(), self.config.train.steps
        with contextlib.closing(cast("Any", self.loader.stream(self.consumed))) as stream:
            while self.step < steps and agreed.stop is Stop.NO:
                agreed = self._one_step(stream)
        self.consensus.settle()
        diverged = agreed.stop is Stop.DIVERGED or not self.save()
        self._settle()
        if diverged:
            return Stop.DIVERGED
        if self.step < steps:
            return agreed.stop
        self.evaluations.run_due(self.step)
        return Stop.NO

    def _one_step(self, stream: Iterator[Tokens]) -> Agreement:
        """A step and what is due after it."""
        train = self.config.train
        is_first = self.step == self._first_step
        with self.watchdog.phase("first step", more_s=0.0, teaches=STEP) if is_first else contextlib.nullcontext():
            loss, norm = self.optimizer_step(stream)
        if is_first:
            self.micro_batch.is_proven()
            self._started_up()
            self.saves.prepare(self.learner.tensors())
        self.step += 1
        self.consumed += self.loader.part.samples_per_step
        self.progress.add(self.step, loss, norm)
        self.saves.report(self.log)
        asks = self.ranks.is_first and self.clock.asks_to_save()
        agreed = self.consensus.exchange(self._wish(), save=asks, failed=self.saves.has_failed)
        if agreed.failed:
            self._settle()  # raises it on every rank
        if agreed.stop is Stop.NO and self.step < train.steps:
            self.evaluations.run_due(self.step)  # a stop leaves it to the next attempt, and the end saves first
        every = self.config.checkpoint.every_steps
        due = agreed.save or (every is not None and self.step % every == 0) or self.step == self.config.decay_begins
        if due and agreed.stop is Stop.NO and self.step < train.steps and not self.save():
            return Agreement(Stop.DIVERGED)
        return agreed

    def _started_up(self) -> None:
        """The first step is done: say, and keep, how long that took."""
        self._wait_for_device()
        self.start_up.done(startup.FIRST_STEP)
        if self.ranks.is_first:
            cache = startup.compile_cache()
            self.say(self.start_up.line(cache))
            with contextlib.suppress(OSError):  # a full disk; no reason to end here
                self.ledger.note(self.attempt, start_up=self.start_up.phases, compile_cache=cache and cache.state)

    def _wait_for_device(self) -> None:
        """So that what was queued counts for its own phase."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def optimizer_step(self, stream: Iterator[Tokens]) -> tuple[Tensor, Tensor]:
        """Take one; returns the mean loss and the gradient's norm, on the device."""
        return self.learner.learn(self._micro_batches(stream), self.step)

    def _micro_batches(self, stream: Iterator[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the step, as inputs and targets on the device; it is noted how long each is waited for."""
        part = self.loader.part
        for micro_step in range(part.grad_accum_steps):
            began = time.perf_counter()
            windows = next(stream)
            self.progress.waited(time.perf_counter() - began)
            self.watchdog.beat()
            if self.config.train.trace_data:
                where = self.run_dir.trace(self.ranks.rank)
                trace(where, part, step=self.step + 1, consumed=self.consumed, micro_step=micro_step)
            yield to_device(windows, self.ranks.device)

    def _wish(self) -> Stop:
        wish = self.signals.stop
        if self.ranks.is_first:
            if self.clock.is_end_near(self.progress.step_s, is_saving=self.saves.is_under_way):
                wish = max(wish, Stop.TIME_LIMIT)
            if self.stop_file.is_there():
                wish = max(wish, Stop.STOPPED)
        return max(wish, Stop.DIVERGED) if self.progress.diverged else wish

    # Saves ------------------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Begin to save this step unless it is saved; False, and nothing saved, if the loss was not finite since."""
        with self.watchdog.phase("save", more_s=0.0):
            return self._save()

    def _settle(self) -> None:
        with self.watchdog.phase("save", more_s=0.0):
            self.saves.settle(self.log)

    def _save(self) -> bool:
        self.progress.flush()
        if self.learner.is_broken():
            return False
        if self.saves.step == self.step:
            return True
        if self.ranks.device.type == "cpu":
            heap.give_back()
        rank_state = state.rank_state(self.ranks.device)
        self.saves.begin(self.step, self.learner.tensors(), rank_state, self._facts(), self.log)
        self.progress.restart_clock(self.step)
        return True

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "run": self.identity,
            "world_size": self.ranks.world_size,
            "threads": torch.get_num_threads(),
            "attempt": self.attempt.number,
            "data": {
                "samples_consumed": self.consumed,
                "epoch": self.consumed // self.loader.order.per_epoch,
                "seed": self.config.train.seed,
                "block_size": self.config.model.block_size,
                "manifest_sha256": self.manifest_sha256,
            },
            "micro_batch": self.micro_batch.found,
            "scaler": self.learner.scaler_facts(),
            "config": dataclasses.asdict(self.config),
            "versions": {"gpt2hpc": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
