"""AdamW and its learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from gpt2hpc.config import Config, OptimizerConfig


def new_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on the weights with two or more dimensions only, so not on biases and layer norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    peak = config.learning_rate * config.lr_multiplier
    return torch.optim.AdamW(groups, lr=peak, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Of the step after `step` finished ones: linear warm-up, then cosine down to `min_lr_ratio` of the peak.

    A pure function of the step, so there is no schedule state to save.
    """
    optimizer, steps = config.optimizer, config.train.steps
    peak = optimizer.learning_rate * optimizer.lr_multiplier
    warmup = optimizer.warmup_tokens // config.train.tokens_per_step
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * cosine)
