"""Ways to take training steps of one GPT-2, from the same weights, over the same batches, at the same learning rates."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.textbook import Textbook, rate
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.config import Config
from gpt2hpc.config_rules import grad_accum_steps
from gpt2hpc.model import hf_weights
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import heap, precision
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.process_group import Ranks


class Batches:
    """The inputs and targets of each micro batch: numbers as frequent as words are, the same for everyone; on the device already."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        weights = 1 / (np.arange(config.model.vocab_size) + 3.0)
        self.cumulated = np.cumsum(weights / weights.sum())
        self.drawn = [list(self._of(step)) for step in range(config.train.steps)]

    def of_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.drawn[step])

    def _of(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows, length = self.config.train.micro_batch_size, self.config.model.block_size
        for micro in range(grad_accum_steps(self.config, world_size=1)):
            drawn = np.random.default_rng((step, micro)).random((rows, length + 1))
            tokens = torch.from_numpy(np.searchsorted(self.cumulated, drawn)).to(self.device)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Contender(ABC):
    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.batches = config, Batches(config, device)

    @abstractmethod
    def step(self, number: int) -> Tensor:
        """Take the step after `number` steps; its loss, on the device."""


class Ours(Contender):
    """What the trainer does with each step."""

    def __init__(self, config: Config, device: torch.device) -> None:
        if device.type == "cpu":
            heap.keep_freed()
        super().__init__(config, device)
        self.learner = Learner(config, Ranks(DistEnv.from_env({}), device), beat=lambda: None)
        self.learner.model.train()
        self.learner.wrap()
        self.learner.warm_up()

    def step(self, number: int) -> Tensor:
        return self.learner.learn(self.batches.of_step(number), number)[0]


class OursReplayed(Ours):
    """The same with train.cuda_graphs."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=True)), device)


class Plain(Contender):
    """A plain loop around some model: torch's default AdamW, clipping, and nothing fused."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.model = self.new_model(config, device)
        self.precision = precision.choose(config.train.precision, device)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [each for each in parameters if each.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
            {"params": [each for each in parameters if each.dim() < 2], "weight_decay": 0.0},
        ]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.eps
        )
        self.called: Any = torch.compile(self.model) if config.train.compile else self.model

    @abstractmethod
    def new_model(self, config: Config, device: torch.device) -> nn.Module:
        """With our random weights of the same seed."""

    @abstractmethod
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor: ...

    def step(self, number: int) -> Tensor:
        settings, train = self.config.optimizer, self.config.train
        peak, warmup = settings.learning_rate, settings.warmup_tokens // train.tokens_per_step
        for group in self.optimizer.param_groups:
            group["lr"] = rate(number, peak=peak, least=settings.min_lr_ratio * peak, warmup=warmup, steps=train.steps)
        total, share = torch.zeros((), device=self.batches.device), grad_accum_steps(self.config, world_size=1)
        for tokens, targets in self.batches.of_step(number):
            with self.precision.autocast():
                loss = self.loss(tokens, targets) / share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


class PlainTextbook(Plain):
    """nanoGPT's way. On a GPU with its rows of padding, which are faster there and take part in its loss."""

    def new_model(self, config: Config, device: torch.device) -> nn.Module:
        shape = config.model
        rows = shape.padded_vocab_size if device.type == "cuda" else shape.vocab_size
        model = Textbook(shape, rows).to(device)
        weights = our_weights(config, device)
        weights["wte.weight"] = weights["wte.weight"][:rows]
        model.load_state_dict({**weights, "lm_head.weight": weights["wte.weight"]})
        return model

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.called(tokens, targets)[1]
        return loss


class PlainTransformers(Plain):
    """GPT2LMHeadModel, whose logits are what it is asked for: its own loss would shift the targets once more."""

    def new_model(self, config: Config, device: torch.device) -> nn.Module:
        from transformers import GPT2LMHeadModel

        shape = hf_weights.to_config(config.model, end_of_text=None)
        shape.resid_pdrop = shape.embd_pdrop = shape.attn_pdrop = config.model.dropout
        shape.use_cache = False
        model: nn.Module = GPT2LMHeadModel(shape).to(device)
        theirs = hf_weights.to_state_dict(our_weights(config, device), config.model)
        model.load_state_dict(theirs, strict=False)
        return model.train()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.called(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


CONTENDERS: dict[str, type[Contender]] = {
    "gpt2hpc": Ours,
    "gpt2hpc, CUDA graphs": OursReplayed,
    "nanoGPT-style": PlainTextbook,
    "transformers": PlainTransformers,
}


def our_weights(config: Config, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(config.train.seed)
    return {name: weight.detach().clone() for name, weight in GPT(config.model).to(device).named_parameters()}


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """What libraries print goes to stderr: stdout carries answers."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
