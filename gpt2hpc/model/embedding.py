"""The embedding of tokens, whose gradient a compiled step on a CPU adds up in the same order each time.

Tokens occur more than once, and the compiler lets several threads add to the same row, in whatever order they come to it: last bits
would differ from run to run. torch's own kernel gives each thread rows of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Embedding):
    """torch's, but for how a compiled step on a CPU computes its gradient."""

    def forward(self, tokens: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.weight.device.type == "cpu":
            out: Tensor = torch.ops.gpt2hpc.embedding(self.weight, tokens)
            return out
        return super().forward(tokens)


@torch.library.custom_op("gpt2hpc::embedding", mutates_args=())
def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows of `weight`, shaped (n, width), of tokens, shaped (…), to (…, width)."""
    return F.embedding(tokens, weight)


@embedding.register_fake
def _(weight: Tensor, tokens: Tensor) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[1]))


@torch.library.custom_op("gpt2hpc::embedding_backward", mutates_args=())
def embedding_backward(grad: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """The gradient by `weight`, which has so many rows."""
    found: Tensor = torch.ops.aten.embedding_dense_backward(grad, tokens, rows, -1, False)
    return found


@embedding_backward.register_fake
def _(grad: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return grad.new_empty((rows, grad.shape[-1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    weight, tokens = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(tokens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    found: Tensor = torch.ops.gpt2hpc.embedding_backward(grad, *ctx.saved_tensors, ctx.rows)
    return found, None


embedding.register_autograd(_backward, setup_context=_keep)
