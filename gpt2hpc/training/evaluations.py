"""What is measured at intervals while training: the validation loss, and HellaSwag; each step at most once, over all attempts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gpt2hpc.config import Config
from gpt2hpc.data.loader import ValLoader
from gpt2hpc.evaluation import hellaswag
from gpt2hpc.evaluation.examples import Example
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training.metrics import MetricsLog
from gpt2hpc.training.precision import Precision
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.progress import Progress
from gpt2hpc.training.stop import Clock
from gpt2hpc.training.validation import validation_loss


class Evaluations:
    """Every rank has one, and calls it at the same steps.

    Args:
        model: The model itself, not DDP's wrapper.
        config: Settings of the run.
        ranks: This process among its peers.
        precision: As in training.
        val_loader: Tokens of the validation.
        examples: HellaSwag's, that fit the model; none if it is not asked for.
        log: Knows what earlier attempts have measured.
        progress: Leaves the time out of the rates.
        clock: Is told how long it takes.
    """

    def __init__(
        self,
        model: GPT,
        config: Config,
        *,
        ranks: Ranks,
        precision: Precision,
        val_loader: ValLoader,
        examples: Sequence[Example],
        log: MetricsLog,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self._model, self._train, self._ranks, self._precision = model, config.train, ranks, precision
        self._val_loader, self._examples = val_loader, examples
        self._log, self._progress, self._clock = log, progress, clock

    def run_due(self, step: int) -> None:
        """Measure what is due after `step` steps, at the intervals and at the end, unless an attempt has done so."""
        train = self._train
        at_end = step == train.steps
        validates = at_end or step % train.eval_every == 0
        answers = bool(self._examples) and (at_end or (step > 0 and step % train.hellaswag_every == 0))
        if not validates and not answers:
            return
        known = self._ranks.from_first((self._log.has("val", step), self._log.has("hella", step)))
        todo = [
            work
            for work, due, done in zip((self._validate, self._answer), (validates, answers), known, strict=True)
            if due and not done
        ]
        if not todo:
            return
        self._progress.flush()
        began = time.perf_counter()
        for work in todo:
            work(step)
        self._clock.validated(time.perf_counter() - began)
        self._progress.restart_clock(step)

    def _validate(self, step: int) -> None:
        loss, tokens = validation_loss(self._model, self._val_loader, self._precision)
        self._log.validation(step, loss, tokens)

    def _answer(self, step: int) -> None:
        rank, world_size = self._ranks.rank, self._ranks.world_size
        found = hellaswag.score(self._model, self._examples, self._precision, rank=rank, world_size=world_size)
        self._log.hellaswag(step, acc=found.acc, acc_norm=found.acc_norm, examples=found.examples)
