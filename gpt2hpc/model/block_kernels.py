"""The kernels of fused_blocks, in Triton, for a GPU: each reads and writes every tensor once.

In a backward pass a program goes over every so many rows and sums up what it has seen, since the gradient by a bias or a norm's
weight is such a sum; always in the same order. bench/NOTES.md has what they take, and with which numbers of programs and warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm(
    x: Tensor, added: Tensor, its_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, added = _dense(x, added)
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(added)
    mean, inverse = (x.new_empty(rows) for _ in range(2))
    block = triton.next_power_of_2(width)
    tensors = x, added, its_bias, weight, bias, total, normed, mean, inverse
    _add_norm[(rows,)](*tensors, width, block, eps, num_warps=_warps(block, 256))
    return total, normed, mean, inverse


def add_norm_backward(
    of_total: Tensor, of_normed: Tensor, total: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_total, of_normed, total = _dense(of_total, of_normed, total)
    rows, width = total.shape
    of_x, of_added = torch.empty_like(total), torch.empty_like(of_normed)
    block = triton.next_power_of_2(width)
    warps = _warps(block, 128)
    programs = _programs(total, 32 // warps)
    parts = total.new_empty(programs, 3, width)
    tensors = of_total, of_normed, total, mean, inverse, weight, of_x, of_added, parts
    _add_norm_backward[(programs,)](*tensors, rows, width, block, num_warps=warps)
    return of_x, of_added, parts.sum(0)


def side_by_side(one: Tensor, two: Tensor, three: Tensor) -> tuple[Tensor, Tensor]:
    one, two, three = _dense(one, two, three)
    rows, width = one.shape
    whole, programs = one.new_empty(rows, 3 * width), _programs(one, 4)
    parts = torch.empty(programs, 3 * width, dtype=torch.float32, device=one.device)
    block = triton.next_power_of_2(width)
    _side_by_side[(programs, 3)](one, two, three, whole, parts, rows, width, block, num_warps=_warps(block, 256))
    return whole, parts.sum(0)


COLUMNS = 1024
"""That a program of GELU's takes at once."""


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    [x] = _dense(x)
    rows, width = x.shape
    out = torch.empty_like(x)
    _bias_gelu[(rows, triton.cdiv(width, COLUMNS))](x, bias, out, width, COLUMNS, num_warps=4)
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad, x = _dense(grad, x)
    rows, width = x.shape
    blocks = triton.cdiv(width, COLUMNS)
    of_x, programs = torch.empty_like(x), _programs(x, max(1, 6 // blocks))
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _bias_gelu_backward[(programs, blocks)](grad, x, bias, of_x, parts, rows, width, COLUMNS, num_warps=8)
    return of_x, parts.sum(0)


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Row after row, which the kernels take for granted."""
    return [each.contiguous() for each in tensors]


def _warps(block: int, each: int) -> int:
    """For so many numbers, of which a warp has `each`."""
    return max(1, min(block // each, 16))


def _programs(x: Tensor, each: int) -> int:
    """So many to each multiprocessor; a CPU, on which Triton can interpret kernels, counts as one."""
    units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return min(len(x), each * units)


@triton.jit
def _add_norm(
    x_p,
    added_p,
    its_bias_p,
    weight_p,
    bias_p,
    total_p,
    normed_p,
    mean_p,
    inverse_p,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """A row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = row * WIDTH + columns
    x = tl.load(x_p + at, mask=inside, other=0.0) + tl.load(its_bias_p + columns, mask=inside, other=0.0)
    x += tl.load(added_p + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_p + at, x, mask=inside)
    mean = tl.sum(x, axis=0) / WIDTH
    centred = tl.where(inside, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)
    weight = tl.load(weight_p + columns, mask=inside, other=0.0)
    bias = tl.load(bias_p + columns, mask=inside, other=0.0)
    tl.store(normed_p + at, (centred * inverse * weight + bias).to(normed_p.dtype.element_ty), mask=inside)
    tl.store(mean_p + row, mean)
    tl.store(inverse_p + row, inverse)


@triton.jit
def _add_norm_backward(
    of_total_p,
    of_normed_p,
    total_p,
    mean_p,
    inverse_p,
    weight_p,
    of_x_p,
    of_added_p,
    parts_p,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the next row needs is on its way while one is computed."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weight_p + columns, mask=inside, other=0.0)
    of_its_bias = tl.zeros((BLOCK,), tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    next_normed, next_total, next_x, next_mean, next_inverse = _row(
        of_normed_p, of_total_p, total_p, mean_p, inverse_p, first, rows, columns, WIDTH
    )
    for row in range(first, rows, tl.num_programs(0)):
        of_normed, of_total, x, mean, inverse = next_normed.to(tl.float32), next_total, next_x, next_mean, next_inverse
        next_normed, next_total, next_x, next_mean, next_inverse = _row(
            of_normed_p, of_total_p, total_p, mean_p, inverse_p, row + tl.num_programs(0), rows, columns, WIDTH
        )
        hat = (x - mean) * inverse
        of_weight += of_normed * hat
        of_bias += of_normed
        of_hat = of_normed * weight
        along, level = tl.reduce((of_hat * hat, of_hat), 0, _sums)
        of_x = (of_hat - hat * (along / WIDTH) - level / WIDTH) * inverse + of_total
        of_added = of_x.to(of_added_p.dtype.element_ty)
        at = row * WIDTH + columns
        tl.store(of_x_p + at, of_x, mask=inside)
        tl.store(of_added_p + at, of_added, mask=inside)
        of_its_bias += of_added.to(tl.float32)
    at = first * (3 * WIDTH) + columns
    tl.store(parts_p + at, of_its_bias, mask=inside)
    tl.store(parts_p + at + WIDTH, of_weight, mask=inside)
    tl.store(parts_p + at + 2 * WIDTH, of_bias, mask=inside)


@triton.jit
def _row(of_normed_p, of_total_p, total_p, mean_p, inverse_p, row, rows, columns, WIDTH: tl.constexpr):
    """What _add_norm_backward reads of a row; of one that is not there, zeros."""
    exists = row < rows
    mask = exists & (columns < WIDTH)
    at = row * WIDTH + columns
    return (
        tl.load(of_normed_p + at, mask=mask, other=0.0),
        tl.load(of_total_p + at, mask=mask, other=0.0),
        tl.load(total_p + at, mask=mask, other=0.0),
        tl.load(mean_p + row, mask=exists, other=0.0),
        tl.load(inverse_p + row, mask=exists, other=0.0),
    )


@triton.jit
def _sums(one, other, more_of_one, more_of_other):
    return one + more_of_one, other + more_of_other


@triton.jit
def _side_by_side(one_p, two_p, three_p, whole_p, parts_p, rows, width, BLOCK: tl.constexpr):
    """One of the three."""
    which = tl.program_id(1)
    x_p = one_p
    if which == 1:
        x_p = two_p
    if which == 2:
        x_p = three_p
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    sums = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for row in range(first, rows, tl.num_programs(0)):
        x = tl.load(x_p + row * width + columns, mask=inside, other=0.0)
        tl.store(whole_p + (3 * row + which) * width + columns, x, mask=inside)
        sums += x.to(tl.float32)
    tl.store(parts_p + (3 * first + which) * width + columns, sums, mask=inside)


LINEAR, CUBIC = tl.constexpr(2.302208198), tl.constexpr(0.102943236)
"""2·log₂e·√(2/π), and that times 0.044715."""
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(z, square):
    """By tanh gelu(z) is z·σ(2u), where u is √(2/π)·(z + 0.044715·z³): that σ. 1/y is rsqrt(y)² here, an instruction and a product."""
    root = tl.rsqrt(1.0 + tl.exp2(-z * (LINEAR + CUBIC * square)))
    return root * root


@triton.jit
def _bias_gelu(x_p, bias_p, out_p, width, BLOCK: tl.constexpr):
    """A row of a block of columns."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    z = tl.load(x_p + at, mask=inside, other=0.0).to(tl.float32) + tl.load(bias_p + columns, mask=inside, other=0.0)
    tl.store(out_p + at, (z * _sigmoid(z, z * z)).to(out_p.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward(grad_p, x_p, bias_p, of_x_p, parts_p, rows, width, BLOCK: tl.constexpr):
    """A block of columns."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    bias = tl.load(bias_p + columns, mask=inside, other=0.0)
    sums = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for row in range(first, rows, tl.num_programs(0)):
        at = row * width + columns
        z = tl.load(x_p + at, mask=inside, other=0.0).to(tl.float32) + bias
        grad = tl.load(grad_p + at, mask=inside, other=0.0).to(tl.float32)
        square = z * z
        sigmoid = _sigmoid(z, square)
        scaled = z * sigmoid
        slope = sigmoid + (scaled - scaled * sigmoid) * (LN_2 * LINEAR + 3.0 * LN_2 * CUBIC * square)
        of_x = (grad * slope).to(of_x_p.dtype.element_ty)
        tl.store(of_x_p + at, of_x, mask=inside)
        sums += of_x.to(tl.float32)
    tl.store(parts_p + first * width + columns, sums, mask=inside)
