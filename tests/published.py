"""GPT-2 as the transformers library builds it, with random weights: what published weights look like, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gpt2hpc.config import ModelConfig


def published(config: ModelConfig, **settings: Any) -> Any:
    """A GPT2LMHeadModel of that shape; its biases and norms differ from 0 and 1, which would hide a mix-up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **settings,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def directory_of(path: Path, config: ModelConfig, **settings: Any) -> Path:
    """The same, saved by transformers."""
    published(config, **settings).save_pretrained(path)
    return path
