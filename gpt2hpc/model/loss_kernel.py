"""Softmax cross-entropy of rows of logits, and its gradient in their place, on a GPU: a kernel in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 16
"""Numbers of a row that are read at once, and by how many warps (bench/NOTES.md)."""


def losses_and_gradients_in_place(logits: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Each token's loss, shaped (tokens), in fp32; `logits`, shaped (tokens, rows), become the gradients by them.

    Rows past `vocabulary` have no probability; a token whose target is none of the rows, as -100, does not count.
    """
    tokens, rows = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    _kernel[(tokens,)](logits, targets, losses, vocabulary, rows, BLOCK, num_warps=WARPS)
    return losses


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _kernel(logits, targets, losses, VOCABULARY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A token: maximum and sum of exponentials in one pass over its logits (Milakov & Gimelshein 2018, arXiv:1805.02867), gradients in
    a second one, which finds them in the cache still. Exponents are of 2, of which a GPU has an instruction."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * ROWS
    target = tl.load(targets + token)
    counts = (target >= 0) & (target < ROWS)
    columns = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), -1e30, tl.float32)  # not -inf, from which -inf cannot be subtracted
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, VOCABULARY, BLOCK):
        at = begin + columns
        x = tl.load(logits + at, mask=at < ROWS, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
        x = tl.where(at < VOCABULARY, x, -float("inf"))  # not by the mask, with which numbers would be read one by one
        smaller = tl.exp2(-tl.abs(x - tops) * LOG2_E)
        sums = tl.where(x > tops, sums * smaller + 1.0, sums + smaller)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, axis=0)
    total = tl.log2(tl.sum(sums * tl.exp2((tops - top) * LOG2_E), axis=0)) + top * LOG2_E
    own = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32) * LOG2_E - total
    tl.store(losses + token, tl.where(counts, -own / LOG2_E, 0.0))
    total = tl.where(counts, total, float("inf"))  # of which no gradient is left
    tl.debug_barrier()  # the target's logit is read by all before it is overwritten
    for begin in range(0, ROWS, BLOCK):
        at = begin + columns
        x = tl.load(logits + at, mask=at < ROWS, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
        x = tl.where(at < VOCABULARY, x, -float("inf"))
        gradients = tl.exp2(x * LOG2_E - total).to(logits.dtype.element_ty)
        tl.store(logits + at, gradients, mask=at < ROWS, eviction_policy="evict_first")
    tl.debug_barrier()  # the target's gradient is written last
    tl.store(logits + target, (tl.exp2(own) - 1.0).to(logits.dtype.element_ty), mask=counts)
