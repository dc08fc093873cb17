"""Checkpoints of build-nanogpt and nanoGPT: one `.pt` file, by torch.save, read without trusting it.

Keys: `model`, and where they are `optimizer`, `config` (or `model_args`), `step` (or `iter_num`), `val_loss` (or `best_val_loss`),
`scaler`. The file is a pickle; torch's restricted unpickler builds tensors and plain containers only. A class of settings, such as
`__main__.GPTConfig`, becomes an empty class that merely holds the attributes. A file that asks for anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2hpc.config import ModelConfig
from gpt2hpc.data.tokenizer import VOCAB_SIZE
from gpt2hpc.errors import ConfigError, DataError, MissingError

SUFFIXES = (".pt", ".pth")
PADDED_TO = 128
"""Multiple of which others pad the vocabulary at most."""
HEAD_WIDTH = 64
"""Of every published GPT-2."""

_PREFIXES = ("_orig_mod.", "module.", "transformer.")
_MASKS = (".attn.bias", ".attn.masked_bias")
_SETTINGS_CLASS = re.compile(r"[\w.]+\.\w*(Config|Args)")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class PtFile:
    """What such a file holds.

    Args:
        config: Shape of the model.
        tensors: `model/NAME`, and `optimizer/KIND/NAME` of AdamW where the file has its state, with the rows that the file has.
        step: Finished optimizer steps; 0 where the file does not say.
        val_loss: In nats.
        scaler: `scale` and `_growth_tracker` of fp16's loss scaling; empty where there was none.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    step: int
    val_loss: float | None
    scaler: dict[str, float]

    @property
    def has_optimizer(self) -> bool:
        return any(name.startswith("optimizer/") for name in self.tensors)


def read(path: Path) -> PtFile:
    """The file's contents, on the CPU; nothing that is in it runs.

    Raises DataError for a file that is damaged, asks for more than data, or contradicts itself, and ConfigError for another model.
    """
    try:
        return _read(path)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(f"{path} has not the layout of build-nanogpt or nanoGPT ({error}); use another file") from None


def _read(path: Path) -> PtFile:
    contents = _loaded(path)
    weights = contents.get("model") if isinstance(contents, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise DataError(f"{path} holds no weights under the key model, as build-nanogpt and nanoGPT write them")
    named = {_name(key): tensor for key, tensor in weights.items() if not key.endswith(_MASKS)}
    named.pop("lm_head.weight", None)  # the embedding
    config = _config(path, named, _settings(contents.get("model_args", contents.get("config"))))
    _check_names(path, named, config)
    tensors = {f"model/{name}": tensor.float() for name, tensor in named.items()}
    if (optimizer := contents.get("optimizer")) is not None:
        try:
            tensors |= _optimizer_state(optimizer, named)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} holds an optimizer that is not AdamW of this model ({error}); use it with --init"
            ) from None
    step, loss = contents.get("step", contents.get("iter_num", 0)), contents.get("val_loss")
    scaler = contents.get("scaler") or {}
    if not 0 <= int(step) < 10**9:
        raise ValueError(f"step={step}")
    loss = contents.get("best_val_loss") if loss is None else loss
    kept = {key: float(scaler[key]) for key in ("scale", "_growth_tracker") if key in scaler}
    return PtFile(config, tensors, int(step), None if loss is None else float(loss), kept)


class _Settings:
    """Stands for a class of settings: takes whatever it is given, and does nothing."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass


def _loaded(path: Path) -> Any:
    """The unpickled file; DataError for any global but torch's own, NumPy's arrays and classes of settings."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a .pt file") from None
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise MissingError(f"torch {torch.__version__} cannot read {path} safely: pip install 'torch>=2.6'")
    try:
        allowed, strangers = _known_globals(), torch.serialization.get_unsafe_globals_in_checkpoint(path)
        for name in strangers:
            if name not in allowed:
                if not _SETTINGS_CLASS.fullmatch(name):
                    raise DataError(
                        f"{path} asks for {name} when it is read, which is no data: not read, since it could run anything; "
                        "save it anew with tensors, numbers and texts only"
                    )
                allowed[name] = type("Settings", (_Settings,), {})
        with torch.serialization.safe_globals([(kind, name) for name, kind in allowed.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged or hostile pickle ends in; the reader has run none of it
        raise DataError(f"{path} is damaged, or no file of torch.save ({_said(error)}); copy it again") from error


def _said(error: Exception) -> str:
    """The reason, without torch's advice to trust the file."""
    lines = str(error).partition("Check the documentation")[0].split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)
    return last.rpartition("WeightsUnpickler error: ")[2][:200]


def _known_globals() -> dict[str, Any]:
    """What an array or a number of NumPy asks for, in both of its major versions: build data, and no more."""
    multiarray = np.core.multiarray if np.__version__.startswith("1.") else np._core.multiarray  # type: ignore[attr-defined]
    known: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known |= {f"{module}._reconstruct": multiarray._reconstruct, f"{module}.scalar": multiarray.scalar}
    known |= {f"numpy.dtypes.{kind.__name__}": kind for kind in {type(np.dtype(code)) for code in "bBhHiIlLqQefd?"}}
    return known


def _name(key: str) -> str:
    """Our name of a parameter: without what compile, DDP and the model around it put before."""
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def _settings(config: object) -> dict[str, Any]:
    if config is None:
        return {}
    return config if isinstance(config, dict) else dict(vars(config))


def _config(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ModelConfig:
    """Shape of the model, from the weights; only the number of heads cannot be seen there."""
    try:
        rows, width = weights["wte.weight"].shape
        positions = weights["wpe.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        raise ConfigError(f"{path} holds no wte.weight and wpe.weight, so no GPT-2; use another file") from None
    layers = {name.split(".")[1] for name in weights if name.startswith("h.")}
    heads = settings.get("n_head", width // HEAD_WIDTH)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConfigError(
            f"{path} does not tell n_head, or n_head={heads} does not divide n_embd={width}; add a config to it"
        )
    return ModelConfig(
        n_layer=len(layers),
        n_head=heads,
        n_embd=width,
        block_size=positions,
        vocab_size=VOCAB_SIZE if VOCAB_SIZE <= rows < VOCAB_SIZE + PADDED_TO else rows,
        padded_vocab_size=rows,
    )


def _check_names(path: Path, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raise ConfigError unless it has the parameters of a GPT-2 of that shape."""
    from gpt2hpc.model.gpt import GPT

    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
    for name, tensor in weights.items():
        if name in expected and tensor.shape != expected[name]:
            raise ConfigError(
                f"{path} holds {name} of shape {tuple(tensor.shape)}, and GPT-2's is {tuple(expected[name])}; use another file"
            )
    odd = sorted(weights.keys() ^ expected.keys())
    if odd:
        word = "lacks" if odd[0] in expected else "holds"
        raise ConfigError(f"{path} {word} {', '.join(odd[:3])}, so it is no GPT-2 with biases; use another file")


def _optimizer_state(optimizer: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's state by name; ValueError, KeyError and the like where it does not fit the weights.

    The file numbers the parameters: first those that decay, of two dimensions, then the others, each in the model's order.
    """
    groups, order = optimizer["param_groups"], list(weights)
    if len(groups) > 1:
        order = sorted(weights, key=lambda name: weights[name].dim() < 2)
        sizes = [len(group["params"]) for group in groups]
        decayed = sum(tensor.dim() >= 2 for tensor in weights.values())
        if sizes != [decayed, len(weights) - decayed]:
            raise ValueError(f"its groups have {sizes} parameters, not {[decayed, len(weights) - decayed]}")
    numbers = [number for group in groups for number in group["params"]]
    result = {}
    for number, name in zip(numbers, order, strict=True):
        if number not in optimizer["state"]:
            continue  # before its first step
        entry = optimizer["state"][number]
        if set(entry) != {"step", *_MOMENTS}:
            raise ValueError(f"it keeps {', '.join(sorted(entry))} of {name}")
        for kind in _MOMENTS:
            if entry[kind].shape != weights[name].shape:
                raise ValueError(f"{kind} of {name} has the shape {tuple(entry[kind].shape)}")
            result[f"optimizer/{kind}/{name}"] = entry[kind].float()
        result[f"optimizer/step/{name}"] = torch.tensor(float(entry["step"]), dtype=torch.float32)
    return result
