"""Weights by any name that a user gives them: a published model, a transformers directory, a run, a checkpoint, a `.pt` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gpt2hpc import cli
from gpt2hpc.config import ModelConfig
from gpt2hpc.errors import ConfigError, DataError
from gpt2hpc.model import fit, hf_weights
from gpt2hpc.training import checkpoint, pt_file
from gpt2hpc.training.checkpoint import Checkpoint

Weights = tuple[ModelConfig, dict[str, Tensor]]


def initial_weights(init: str, config: ModelConfig) -> dict[str, Tensor]:
    """Parameters by name, fp32, for a model of that shape to begin with: `train.init`.

    A vocabulary is padded and positions are cropped. Raises DataError where there are no such weights, ConfigError where they are of
    another shape.
    """
    own, weights = named(init)
    return fit.fitted(weights, own, config, source=init)


def named(source: str) -> Weights:
    """Shape and weights of `source`. A published name is one even where a directory has it too: that is `./gpt2`."""
    path = Path(source)
    if hf_weights.is_published(source):
        return hf_weights.pretrained(source)
    if path.suffix in pt_file.SUFFIXES and not path.is_dir():
        file = pt_file.read(path)
        return file.config, _model(file.tensors)
    if hf_weights.is_directory(path):
        return hf_weights.pretrained(source)
    if not path.is_dir():
        raise DataError(
            f"--init={source} is no directory, no .pt file and none of {', '.join(hf_weights.PUBLISHED)}; check the spelling"
        )
    return of_checkpoint(checkpoint.at(path, cli.warn))


def of_checkpoint(found: Checkpoint) -> Weights:
    """Shape and weights of a checkpoint of ours."""
    try:
        config = ModelConfig(**found.manifest()["config"]["model"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{found.path} is of another version: its model settings do not fit ({error})") from None
    return config, _model(dict(found.tensors("model/")))


def _model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
