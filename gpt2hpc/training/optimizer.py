"""What updates the parameters."""

from __future__ import annotations

import torch
from torch import nn

from gpt2hpc.config import OptimizerConfig


def new_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on the weights with two or more dimensions only, so not on biases and layer norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    peak = config.learning_rate * config.lr_multiplier
    return torch.optim.AdamW(groups, lr=peak, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
