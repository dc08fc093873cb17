"""The memory that a rank needs to train, in bytes, by formula. Needs no torch, so a login node can ask it.

Weights, gradients and AdamW's moments are 4 + 4 + 8 bytes a parameter in fp32 (Rajbhandari et al. 2020, arXiv:1910.02054, section
3.1); the moments divided by ZeRO's first stage. Activations are counted as by Korthikanti et al. (2022, arXiv:2205.05198, sections
4.1 and 5), for this model as autograd saves it without torch.compile: a flash or memory-efficient attention that keeps no scores,
a residual stream in fp32, and all else in the precision of the matrix products. What is compiled needs less.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt2hpc.config import ModelConfig
from gpt2hpc.training.shares import spread

MOMENTS_BYTES, MUON_BYTES = 8, 4
"""Of a parameter: AdamW's two moments, in fp32; Muon's one."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank. `casts` are the weights in 16 bits beside those in fp32, `head` is what logits and loss take at the most."""

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.casts + self.activations + self.head


@dataclass(frozen=True)
class Way:
    """How it is trained: what of the settings the memory depends on, beside the model.

    Args:
        ranks: Of the run.
        sixteen_bits: Whether matrix products are bf16 or fp16 instead of fp32.
        recomputes: train.activation_checkpointing.
        shards: train.shard_optimizer.
        muon: Whether optimizer.name is muon.
    """

    ranks: int = 1
    sixteen_bits: bool = True
    recomputes: bool = False
    shards: bool = False
    muon: bool = False


def parameter_sizes(model: ModelConfig) -> dict[str, int]:
    """Elements of each parameter by name, with the embedding's rows of padding."""
    width = model.n_embd
    sizes = {"wte.weight": model.padded_vocab_size * width, "wpe.weight": model.block_size * width}
    layers = {"ln_1": (width, width), "attn.c_attn": (3 * width**2, 3 * width), "attn.c_proj": (width**2, width)}
    layers |= {"ln_2": (width, width), "mlp.c_fc": (4 * width**2, 4 * width), "mlp.c_proj": (4 * width**2, width)}
    named = {f"h.{number}.{name}": both for number in range(model.n_layer) for name, both in layers.items()}
    for name, (weight, bias) in {**named, "ln_f": (width, width)}.items():
        sizes |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return sizes


def is_inner_matrix(name: str) -> bool:
    """Whether a parameter is a matrix inside a block, which Muon steps with where it is chosen."""
    return name.startswith("h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def footprint(model: ModelConfig, way: Way, *, micro_batch: int) -> Footprint:
    """Of a rank that computes `micro_batch` sequences at once, at the moment when it needs most."""
    sizes = parameter_sizes(model)
    stored = sum(sizes.values())
    moments = max(_moments_of_shares(sizes, way))
    tokens = micro_batch * model.block_size
    moments_most = [_forward_ends(model, way, tokens), _backward_begins(model, way, tokens)]
    if way.recomputes:
        moments_most.append(_block_again(model, way, tokens))
    casts, activations, head = max(moments_most, key=sum)
    return Footprint(4 * stored, 4 * stored, moments, casts, activations, head)


def bytes_of_a_sequence(model: ModelConfig, way: Way) -> int:
    """What one more in a micro batch takes."""
    two, one = (footprint(model, way, micro_batch=rows).total for rows in (65, 64))
    return two - one


def most_fitting(model: ModelConfig, way: Way, *, memory_bytes: float) -> int:
    """The largest micro batch of which a step fits; 0 where none does."""
    if footprint(model, way, micro_batch=1).total > memory_bytes:
        return 0
    low, high = 1, 2
    while footprint(model, way, micro_batch=high).total <= memory_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if footprint(model, way, micro_batch=middle).total <= memory_bytes else (low, middle)
    return low


Moment = tuple[int, int, int]
"""Bytes of casts, activations and head."""


def _forward_ends(model: ModelConfig, way: Way, tokens: int) -> Moment:
    """The logits, in 16 bits their fp32 copy, and their log-softmax: autocast holds every weight it has cast until here."""
    logits = 10 if way.sixteen_bits else 8
    return _all_casts(model, way), tokens * _kept(model, way), logits * tokens * model.padded_vocab_size


def _backward_begins(model: ModelConfig, way: Way, tokens: int) -> Moment:
    """The log-softmax, its gradient and that of the logits, in fp32; or, with few tokens, the gradient of the embedding."""
    vocabulary, number = model.padded_vocab_size, _number(way)
    embedding = (6 if way.sixteen_bits else 4) * vocabulary * model.n_embd
    head = max(12 * tokens * vocabulary, number * tokens * vocabulary + embedding)
    casts = _all_casts(model, way)
    if way.recomputes and way.sixteen_bits:
        casts = 2 * vocabulary * (model.n_embd + 1)
    return casts, tokens * _kept(model, way), head


def _block_again(model: ModelConfig, way: Way, tokens: int) -> Moment:
    """A block computed again, the gradients by its residual stream and within its MLP, of which one takes the place of what GELU
    has returned, and the gradient of one of the MLP's weights, in 16 bits in fp32 too; the embedding's waits for its other half."""
    width, number = model.n_embd, _number(way)
    block = _layer(model, way) + (4 * number + 4) * width
    inputs = 4 * width * model.n_layer
    of_weight = (6 if way.sixteen_bits else 4) * 4 * width**2
    casts = 2 * (12 * width**2 + 9 * width) if way.sixteen_bits else 0
    return casts, tokens * (inputs + block) + of_weight, 4 * model.padded_vocab_size * width


def _kept(model: ModelConfig, way: Way) -> int:
    """Of a token, from forward to backward: all blocks, or what goes into them, and what the head sees."""
    blocks = model.n_layer * (4 * model.n_embd if way.recomputes else _layer(model, way))
    last = (4 + _number(way)) * model.n_embd + 8 + 8  # ln_f's input, output and statistics; the token
    return blocks + last + (model.n_embd if model.dropout else 0)


def _layer(model: ModelConfig, way: Way) -> int:
    """Of a token in a block: inputs of both layer norms in fp32; their outputs, q, k, v, attention's output, the MLP's inside before
    and after GELU; a row of log-sums a head, means and deviations; masks of dropout, a byte a number."""
    masks = 2 * model.n_embd if model.dropout else 0
    return (8 + 14 * _number(way)) * model.n_embd + 4 * model.n_head + 16 + masks


def _number(way: Way) -> int:
    """Bytes of one in a matrix product."""
    return 2 if way.sixteen_bits else 4


def _all_casts(model: ModelConfig, way: Way) -> int:
    blocks = model.n_layer * (12 * model.n_embd**2 + 9 * model.n_embd)
    return 2 * (blocks + model.padded_vocab_size * (model.n_embd + 1)) if way.sixteen_bits else 0


def _moments_of_shares(sizes: dict[str, int], way: Way) -> list[int]:
    """Bytes of each rank's share, as ZeRO's first stage divides them here; of all in one where it does not."""
    owners = spread(sizes, way.ranks if way.shards else 1)
    shares = [0] * way.ranks
    for name, owner in owners.items():
        each = MUON_BYTES if way.muon and is_inner_matrix(name) else MOMENTS_BYTES
        shares[owner] += each * sizes[name]
    return shares
