"""What is done at intervals while training: validation, HellaSwag, samples; each step at most once, over all attempts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gpt2hpc.config import Config
from gpt2hpc.data import tokenizer
from gpt2hpc.data.loader import ValLoader
from gpt2hpc.evaluation import hellaswag
from gpt2hpc.evaluation.examples import Example
from gpt2hpc.model.generate import Choice, generate_batch
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training.metrics import MetricsLog
from gpt2hpc.training.precision import Precision
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.progress import Progress
from gpt2hpc.training.stop import Clock
from gpt2hpc.training.validation import validation_loss
from gpt2hpc.training.watchdog import Watchdog

PROMPTS = ("", "Once upon a time", "The most important thing is")
SAMPLE_TOKENS = 80
"""After each prompt."""


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
        watchdog: Is told that it takes longer than a step, and of each batch.
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
        watchdog: Watchdog,
    ) -> None:
        self._model, self._train, self._ranks, self._precision = model, config.train, ranks, precision
        self._val_loader, self._examples = val_loader, examples
        self._log, self._progress, self._clock, self._watchdog = log, progress, clock, watchdog

    def run_due(self, step: int) -> None:
        """Do what is due after `step` steps, at the intervals and at the end, unless an attempt has done so."""
        asked = self._asked(step)
        if not asked:
            return
        done = self._ranks.from_first([kind for kind in asked if self._log.has(kind, step)])
        if not (todo := [work for kind, work in asked.items() if kind not in done]):
            return
        self._progress.flush()
        with self._watchdog.phase("+".join(kind for kind in asked if kind not in done)):
            for work in todo:
                work(step)
            self._ranks.barrier()  # rank 0 writes alone; for the others that is no step that takes long
        self._progress.restart_clock(step)

    def _asked(self, step: int) -> dict[str, Callable[[int], None]]:
        """What is due, by its name in the log; a validation before the first step too."""
        train = self._train
        asked: dict[str, Callable[[int], None]] = {}
        at_end = step == train.steps
        if at_end or step % train.eval_every == 0:
            asked["val"] = self._validate
        if self._examples and (at_end or (step and step % train.hellaswag_every == 0)):
            asked["hella"] = self._answer
        if train.sample_every is not None and (at_end or (step and step % train.sample_every == 0)):
            asked["sample"] = self._write
        return asked

    def _validate(self, step: int) -> None:
        began = time.perf_counter()
        loss, tokens = validation_loss(self._model, self._val_loader, self._precision, self._watchdog.beat)
        self._log.validation(step, loss, tokens, seconds=self._took("val", began))

    def _answer(self, step: int) -> None:
        began = time.perf_counter()
        found = hellaswag.score(
            self._model,
            self._examples,
            self._precision,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            report=lambda done: self._watchdog.beat(),
        )
        seconds = self._took("hella", began)
        self._log.hellaswag(step, acc=found.acc, acc_norm=found.acc_norm, examples=found.examples, seconds=seconds)

    def _write(self, step: int) -> None:
        """Rank 0's alone, without a random number of the training's; the others meet it at the next step."""
        if not self._ranks.is_first:
            return
        began = time.perf_counter()
        prompts = [[tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(prompt)] for prompt in PROMPTS]
        seeds, stop = range(len(prompts)), tokenizer.END_OF_TEXT
        for found in generate_batch(
            self._model, prompts, max_tokens=SAMPLE_TOKENS, choice=Choice(0.8, top_k=50), seeds=seeds, stop=stop
        ):
            for number, token in found.items():
                prompts[number].append(token)
        self._model.train()
        self._took("sample", began)
        self._log.sample(step, "\n\n---\n\n".join(tokenizer.decode(tokens[1:]) for tokens in prompts) + "\n")

    def _took(self, kind: str, began: float) -> float:
        """Seconds since then, of which the clock is told."""
        seconds = time.perf_counter() - began
        self._clock.took(kind, seconds)
        return seconds
