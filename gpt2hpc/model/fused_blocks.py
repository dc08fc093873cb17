"""GPT-2's blocks for a GPU: the same mathematics as gpt.Block, in operators that read and write each tensor of a step less often.

What lies between the products of a step takes as long as memory needs to hand it over. So a residual addition goes with the layer norm
after it, a bias with what is done to the product next, and the sum that a bias gradient is with whatever reads that gradient anyway.
bench/NOTES.md has what each takes and saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2hpc.model import fused_loss

if TYPE_CHECKING:
    from gpt2hpc.config import ModelConfig
    from gpt2hpc.model.gpt import Block


PAYS = 2**34
"""Tokens of a micro batch times n_embd²: 32 × 1024 of GPT-2 124M are 1.1 times as many."""


def pay(tokens: int, config: ModelConfig) -> bool:
    """Whether so many tokens of a micro batch are enough for these operators to win where each is launched by itself; measured with
    64 × 1,024 of 124M, where they do, and with 16 × 1,024, where they lose. Replayed as CUDA graphs they win there too."""
    return tokens * config.n_embd**2 >= PAYS


def through(blocks: Iterable[nn.Module], x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """`norm` of what the blocks make of `x`, shaped (batch, length, n_embd), with products in `dtype`; without dropout."""
    shape, x = x.shape, x.flatten(0, 1)
    added: Added | None = None
    for block in cast("Iterable[Block]", blocks):
        x, normed = _add_norm(x, added, block.ln_1, dtype)
        attention, projection = block.attn.c_attn, block.attn.c_proj
        parts = _Parts.apply(normed, attention.weight.to(dtype), attention.bias.to(dtype))  # type: ignore[no-untyped-call]
        q, k, v = (part.view(shape) for part in parts)
        attended = block.attn.attend(q, k, v).flatten(0, 1)
        added = attended @ projection.weight.to(dtype).t(), projection.bias
        x, normed = _add_norm(x, added, block.ln_2, dtype)
        inner, outer = block.mlp.c_fc, block.mlp.c_proj
        activation = torch.ops.gpt2hpc.bias_gelu(normed @ inner.weight.to(dtype).t(), inner.bias)
        added = activation @ outer.weight.to(dtype).t(), outer.bias
    if added is not None:
        # By torch's own: its compiler, before 2.13, is slow with the fused loss straight after an operator of ours.
        x = x + (added[0] + added[1])
    out: Tensor = norm(x)
    return out.to(dtype).view(shape)


Added = tuple[Tensor, Tensor]
"""What is to be added to the residual stream: a product, shaped (t, n), and its bias."""


def _add_norm(x: Tensor, added: Added | None, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, with what is added to it, and its norm in `dtype`."""
    if added is None:
        return x, norm(x).to(dtype)
    total, normed, _, _ = torch.ops.gpt2hpc.add_norm(x, *added, norm.weight, norm.bias, norm.eps)
    return total, normed


def _like(x: Tensor) -> Tensor:
    """As operators return it: row after row, however x lies."""
    return x.new_empty(x.shape)


# Residual addition and layer norm ----------------------------------------------------------------------------------


@torch.library.custom_op("gpt2hpc::add_norm", mutates_args=())
def add_norm(
    x: Tensor, added: Tensor, its_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + added + its_bias, shaped (t, n), its norm, and each row's mean and inverse deviation; fp32 but for `added` and the norm."""
    if fused_loss.by_kernel(x):
        from gpt2hpc.model import block_kernels

        return block_kernels.add_norm(x, added, its_bias, weight, bias, eps)
    total = x + added.float() + its_bias
    normed, mean, inverse = torch.native_layer_norm(total, (total.shape[1],), weight, bias, eps)
    return total, normed.to(added.dtype), mean.flatten(), inverse.flatten()


@add_norm.register_fake
def _(
    x: Tensor, added: Tensor, its_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0]  # by len(x) each number of rows would be compiled by itself
    return _like(x), _like(added), x.new_empty(rows), x.new_empty(rows)


@torch.library.custom_op("gpt2hpc::add_norm_backward", mutates_args=())
def add_norm_backward(
    of_total: Tensor, of_normed: Tensor, total: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, `added`, and, as one of shape (3, n), by `its_bias`, `weight` and `bias`."""
    if fused_loss.by_kernel(total):
        from gpt2hpc.model import block_kernels

        return block_kernels.add_norm_backward(of_total, of_normed, total, mean, inverse, weight)
    shape, column = (total.shape[1],), (len(total), 1)
    of_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        *(of_normed.float(), total, shape, mean.view(column), inverse.view(column), weight, weight),
        [True, True, True],
    )
    of_x = of_x + of_total
    of_added = of_x.to(of_normed.dtype, copy=True)  # also where it is the same
    return of_x, of_added, torch.stack([of_added.float().sum(0), of_weight, of_bias])


@add_norm_backward.register_fake
def _(
    of_total: Tensor, of_normed: Tensor, total: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(total), _like(of_normed), total.new_empty(3, total.shape[1])


def _keep_norm(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    total, _, mean, inverse = output
    ctx.save_for_backward(total, mean, inverse, inputs[3])


def _norm_backward(ctx: Any, of_total: Tensor, of_normed: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_added, sums = torch.ops.gpt2hpc.add_norm_backward(of_total, of_normed, *ctx.saved_tensors)
    return of_x, of_added, *sums.unbind(), None


add_norm.register_autograd(_norm_backward, setup_context=_keep_norm)


# Queries, keys and values --------------------------------------------------------------------------------------------


class _Parts(torch.autograd.Function):
    """x·weightᵀ + bias in three parts; x shaped (t, n), weight (3n, n), to (t, n) each.

    No operator, whose outputs may not be views of one tensor, but a function that the compiler looks into.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.t()).chunk(3, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad, sums = torch.ops.gpt2hpc.side_by_side(*grads)
        return grad @ weight, grad.t() @ x, sums.to(grad.dtype)


@torch.library.custom_op("gpt2hpc::side_by_side", mutates_args=())
def side_by_side(one: Tensor, two: Tensor, three: Tensor) -> tuple[Tensor, Tensor]:
    """Three matrices, shaped (t, n) each, as one, and its columns' sums, in fp32."""
    if fused_loss.by_kernel(one):
        from gpt2hpc.model import block_kernels

        return block_kernels.side_by_side(one, two, three)
    whole = torch.cat([one, two, three], dim=1)
    return whole, whole.sum(0, dtype=torch.float32)


@side_by_side.register_fake
def _(one: Tensor, two: Tensor, three: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = one.shape
    return one.new_empty(rows, 3 * width), one.new_empty(3 * width, dtype=torch.float32)


# Bias and GELU -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gpt2hpc::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), shaped (t, m), by the hyperbolic tangent; `bias` in fp32."""
    if fused_loss.by_kernel(x):
        from gpt2hpc.model import block_kernels

        return block_kernels.bias_gelu(x, bias)
    return F.gelu(x.float() + bias, approximate="tanh").to(x.dtype)


@bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return _like(x)


@torch.library.custom_op("gpt2hpc::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by x and by `bias`."""
    if fused_loss.by_kernel(x):
        from gpt2hpc.model import block_kernels

        return block_kernels.bias_gelu_backward(grad, x, bias)
    of_x = torch.ops.aten.gelu_backward(grad.float(), x.float() + bias, approximate="tanh").to(x.dtype)
    return of_x, of_x.sum(0, dtype=torch.float32)


@bias_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(bias)


def _keep_gelu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_bias = torch.ops.gpt2hpc.bias_gelu_backward(grad, *ctx.saved_tensors)
    return of_x, of_bias


bias_gelu.register_autograd(_gelu_backward, setup_context=_keep_gelu)
