"""Head and cross-entropy as one operator, which never holds the logits of a whole micro batch nor a copy of them.

Logits are the largest tensor of GPT-2's step: 50304 numbers a token, which autograd would keep in 16 bits, and read and write
several times. Here a piece of the tokens gets its logits, a kernel puts each token's gradient in their place, and both products that
need it follow at once (as in Liger, arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009). What the backward pass is left to
do is to scale them. bench/NOTES.md has what it takes and saves.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The target of a token that does not count."""
PIECE = 16_384
"""Tokens whose logits are there at once: 1.6 GB in 16 bits; with half as many, adding up the weight's gradient would be felt."""


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Where it is faster, and fused_blocks too, as Triton's kernels run there: in bf16, on CUDA from Ampere on."""
    if device.type != "cuda" or dtype != torch.bfloat16 or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def by_kernel(x: Tensor) -> bool:
    """Whether a kernel in Triton computes with it, and not torch's operators, which say the same to a CPU."""
    return x.is_cuda


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocabulary: int) -> Tensor:
    """The sum of the tokens' cross-entropies in nats.

    Args:
        hidden: What the head sees, shaped (tokens, n_embd), in the number format of the matrix products.
        weight: The embedding, shaped (rows, n_embd), in fp32; those past `vocabulary` are padding, and of no probability.
        targets: Shaped (tokens); IGNORED does not count.
        vocabulary: Tokens that exist.
    """
    with_gradients = torch.is_grad_enabled()
    total: Tensor = torch.ops.gpt2hpc.head_loss(hidden, weight, targets.contiguous(), vocabulary, with_gradients)[0]
    return total


@torch.library.custom_op("gpt2hpc::head_loss", mutates_args=())
def _head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and its gradients by `hidden` and `weight`, which are empty where they are not asked for."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    of_hidden, of_weight = _like_gradients(hidden, weight, with_gradients)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = weight.to(hidden.dtype)
        for begin in range(0, len(hidden), PIECE):
            piece = slice(begin, begin + PIECE)
            logits = hidden[piece] @ rows.t()
            losses[piece] = _losses(logits, targets[piece], vocabulary)
            if with_gradients:  # which are where the logits were
                torch.mm(logits, rows, out=of_hidden[piece])
                product = logits.t() @ hidden[piece]
                _ = of_weight.copy_(product) if begin == 0 else of_weight.add_(product)
            del logits  # before the next piece's
    return losses.sum(), of_hidden, of_weight


def _like_gradients(hidden: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    if not wanted:
        return hidden.new_empty(0), weight.new_empty(0)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


@_head_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty((), dtype=torch.float32), *_like_gradients(hidden, weight, with_gradients)


def _keep(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    of_hidden, of_weight = ctx.saved_tensors
    return (of_hidden * grad).to(of_hidden.dtype), of_weight * grad, None, None, None


_head_loss.register_autograd(_backward, setup_context=_keep)


def _losses(logits: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """As loss_kernel has it, which needs Triton."""
    if by_kernel(logits):
        from gpt2hpc.model.loss_kernel import losses_and_gradients_in_place

        return losses_and_gradients_in_place(logits, targets, vocabulary)
    counts = (targets != IGNORED)[:, None]
    logits[:, vocabulary:] = -torch.inf
    likelihoods = logits.float().log_softmax(dim=1)
    at = targets.clamp(min=0)[:, None]
    losses = torch.where(counts, -likelihoods.gather(1, at), 0.0)[:, 0]
    gradients = likelihoods.exp_().scatter_add_(1, at, torch.full_like(likelihoods[:, :1], -1.0))
    logits.copy_(torch.where(counts, gradients, 0.0))
    return losses
