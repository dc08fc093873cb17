"""GPT-2 on one screen (Radford et al. 2019, section 2.3; parameter names as in OpenAI's checkpoint).

Pre-LN blocks, causal multi-head attention, a tanh-GELU MLP, learned positions, and an embedding that is also the head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt2hpc.config import ModelConfig
from gpt2hpc.model import fused_blocks
from gpt2hpc.model.cache import Cache, Past
from gpt2hpc.model.embedding import Embedding
from gpt2hpc.model.fused_loss import IGNORED, fused_loss
from gpt2hpc.model.products import Linear, linear


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        q, k, v = self.c_attn(x).split(x.shape[2], dim=2)
        out: Tensor = self.resid_dropout(self.c_proj(self.attend(q, k, v, mask, past)))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        """What the heads make of queries, keys and values, all of them shaped (batch, length, n_embd)."""
        batch, length, width = q.shape
        q, k, v = (part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for part in (q, k, v))
        if past is not None:
            k, v = past.extended(k, v, until=length if mask is None else mask.shape[-1])
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        return y.transpose(1, 2).reshape(batch, length, width)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, past)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Tokens shaped (batch, length) to logits shaped (batch, length, padded_vocab_size), or to the mean loss.

    The rows of padding get the logit -inf, as a bias of the head: they can neither be sampled nor share in the loss.

    Args:
        config: Its shape.
        recomputes: In training keep only the input of each block, and compute the block again in the backward pass (Chen et al.
            2016, arXiv:1604.06174): the same numbers, for less memory and a third more computing.
    """

    def __init__(self, config: ModelConfig, *, recomputes: bool = False) -> None:
        super().__init__()
        self.config, self.recomputes = config, recomputes
        self.fuses_loss = self.fuses_blocks = False
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self._initialize()

    def fuse(self, *, blocks: bool = True) -> None:
        """Use operators of ours for a GPU, where they can be: fused_loss for a mean or a sum, and fused_blocks."""
        self.fuses_loss, self.fuses_blocks = True, blocks

    def forward(self, tokens: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits, or with `targets` (batch, length; -100 does not count) the cross-entropy in nats, reduced."""
        hidden = self.hidden(tokens)
        if targets is None:
            return self.head(hidden)
        if self.fuses_loss and reduction != "none":
            return self._fused_loss(hidden.flatten(0, 1), targets.flatten(), reduction)
        logits = self.head(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction=reduction)

    def _fused_loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        total = fused_loss(
            hidden.to(_dtype_of_products(hidden)), self.wte.weight, targets, vocabulary=self.config.vocab_size
        )
        return total if reduction == "sum" else total / (targets != IGNORED).sum()

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """What the head sees, shaped (batch, length, n_embd); where operators are fused, in the number format of the products already.

        Args:
            tokens: Shaped (batch, length).
            positions: Of the tokens, shaped as they are; 0, 1, 2 … where they are not given.
            mask: True where a token (second last dimension) may look at another one (last), shaped (batch, 1, length, length);
                itself and those before it where it is not given.
            cache: Of what was read before, to which these tokens are added at their positions. The last dimension of `mask` then
                goes over the cache's columns; without `mask` the tokens are the first.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        suited = mask is None and cache is None and not (self.training and (self.recomputes or self.drop.p))
        if self.fuses_blocks and suited:
            return fused_blocks.through(self.h, x, self.ln_f, _dtype_of_products(x))
        for number, block in enumerate(self.h):
            if self.recomputes and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)  # it restores the random generators for dropout
            else:
                x = block(x, mask, None if cache is None else cache.past(number, positions))
        normed: Tensor = self.ln_f(x)
        return normed

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, shaped (…, padded_vocab_size), of what `hidden` returned, shaped (…, n_embd)."""
        return linear(hidden, self.wte.weight, self._padding(hidden.device))

    def _padding(self, device: torch.device) -> Tensor:
        """The head's bias; made anew each time, since as a buffer DDP would broadcast it."""
        rows = torch.arange(self.config.padded_vocab_size, device=device)
        return torch.where(rows < self.config.vocab_size, 0.0, -math.inf)

    @torch.no_grad()
    def _initialize(self) -> None:
        """N(0, 0.02); projections into the residual stream scaled by 1/√(2·n_layer) (section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() >= 2:
                scale = 1 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                parameter.normal_(0.0, 0.02 * scale)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
