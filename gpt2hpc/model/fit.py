"""Weights of one GPT-2 for the settings of another: rows of the vocabulary padded, positions cropped; any other shape is refused."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gpt2hpc import config_io
from gpt2hpc.config import ModelConfig
from gpt2hpc.errors import ConfigError

SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size")


def fitted(
    tensors: Mapping[str, Tensor], own: ModelConfig, wanted: ModelConfig, *, source: str, key: str = "--init"
) -> dict[str, Tensor]:
    """`tensors` of a model shaped `own` as a model shaped `wanted` has them; also an optimizer's moments of them.

    Names end in a parameter's: `wte.weight`, `optimizer/exp_avg/wte.weight`. Rows past the vocabulary become zero. Raises
    ConfigError, which calls the weights `key`=`source`, for any other shape and for more positions than there are.
    """
    check(own, wanted, source=source, key=key)
    rows = {
        "wte.weight": (wanted.vocab_size, wanted.padded_vocab_size),
        "wpe.weight": (wanted.block_size, wanted.block_size),
    }
    result = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and (parameter := name.rpartition("/")[2]) in rows:
            kept, total = rows[parameter]
            padded = tensor.new_zeros(total, tensor.shape[1])
            padded[:kept] = tensor[:kept]
            tensor = padded
        result[name] = tensor
    return result


def check(own: ModelConfig, wanted: ModelConfig, *, source: str, key: str = "--init") -> None:
    """Raise ConfigError, naming every setting that differs, unless `fitted` can do it."""
    pairs = [(name, getattr(own, name), getattr(wanted, name)) for name in SHAPE]
    differing = [(name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]
    if differing:
        told = ", ".join(f"model.{name}={ours} but {theirs} there" for name, theirs, ours in differing)
        raise ConfigError(f"{key}={source} is another model than the settings say: {told}; use {_settings(own)}")
    if wanted.block_size > own.block_size:
        raise ConfigError(
            f"model.block_size={wanted.block_size} is more than the {own.block_size} positions of {key}={source}; "
            f"use --model.block_size {own.block_size} or less, or train without {key}"
        )


def _settings(model: ModelConfig) -> str:
    """The preset of that shape, or else flags."""
    shape = [getattr(model, name) for name in SHAPE]
    for preset, path in config_io.presets().items():
        if [getattr(config_io.load(path).model, name) for name in SHAPE] == shape:
            return f"--preset {preset}"
    return " ".join(f"--model.{name} {value}" for name, value in zip(SHAPE, shape, strict=True))
