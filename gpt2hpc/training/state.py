"""All that a bit-identical continuation needs, as named tensors and texts; and back.

Full tensors by parameter name: `model/h.0.attn.c_attn.weight`, `optimizer/exp_avg/h.0.attn.c_attn.weight`. Each rank
adds its random number generators: Python, NumPy, torch's CPU and its device.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2hpc.errors import ConfigError
from gpt2hpc.training.optimizer import state_kinds

RankState = tuple[dict[str, Tensor], dict[str, str]]


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Parameters and optimizer state by name, of all parameters or of `only` some; views, not copies."""
    parameters = {name: each for name, each in model.named_parameters() if only is None or name in only}
    tensors = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{kind}/{name}"] = value
    return tensors


def load_model(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy `model/…` into the parameters; ConfigError where names or shapes differ."""
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for key, tensor in tensors:
        name = key.removeprefix("model/")
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ConfigError(
                f"the checkpoint holds {name} of shape {tuple(tensor.shape)}, which this model has not; use the settings it was "
                "trained with"
            )
        with torch.no_grad():
            parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {', '.join(sorted(missing)[:3])}; use the settings it was trained with"
        )


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    only: Collection[str] | None = None,
) -> None:
    """Set the optimizer's state from `optimizer/KIND/NAME`, all of it or that of `only` some parameters; settings such as the
    learning rate are not touched.

    Raises ConfigError for state of another optimizer or shape, which a fused step would follow past the end of its memory, and where
    some parameters have state and others none.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = {name: parameter for parameter, name in names.items()}
    by_name: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, set[str]] = {}
    for key, tensor in tensors:
        _, kind, name = key.split("/", 2)
        parameter = parameters.get(name)
        if parameter is not None and tensor.shape != (torch.Size() if kind == "step" else parameter.shape):
            raise ConfigError(
                f"the checkpoint holds optimizer/{kind}/{name} of shape {tuple(tensor.shape)}, which does not fit {name} of shape "
                f"{tuple(parameter.shape)}; use another checkpoint"
            )
        kinds.setdefault(name, set()).add(kind)
        own = by_name.setdefault(name, {})
        if only is None or name in only:
            own[kind] = tensor
    _check_kinds(optimizer, names, kinds)
    if by_name and (odd := sorted(by_name.keys() ^ set(names.values()))):
        raise ConfigError(
            f"the checkpoint's optimizer and this model differ in {', '.join(odd[:3])}; use the settings it was trained with"
        )
    current = optimizer.state_dict()
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    current["state"] = {index: by_name[name] for index, name in enumerate(order) if by_name.get(name)}
    optimizer.load_state_dict(current)


def _check_kinds(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], kinds: Mapping[str, Collection[str]]
) -> None:
    for group in optimizer.param_groups:
        due = state_kinds(group)
        for name in (names[parameter] for parameter in group["params"]):
            if name in kinds and kinds[name] != due:
                raise ConfigError(
                    f"the checkpoint is of another optimizer: of {name} it holds {', '.join(sorted(kinds[name]))}, this run's keeps "
                    f"{', '.join(sorted(due))}; use its --optimizer.name, or --init for the weights alone"
                )


def rank_state(device: torch.device) -> RankState:
    """This process's random number generators."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        tensors["mps"] = torch.mps.get_rng_state()
    texts = {"python": json.dumps([version, gauss]), "numpy": json.dumps([str(kind), position, has_gauss, cached])}
    return tensors, texts


def restore_rank_state(state: RankState, device: torch.device) -> None:
    """Undo what ran since `rank_state`."""
    tensors, texts = state
    version, gauss = json.loads(texts["python"])
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = json.loads(texts["numpy"])
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    elif device.type == "mps" and "mps" in tensors:
        torch.mps.set_rng_state(tensors["mps"])


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Fresh generators for a rank that has none to restore; every (seed, rank, step) gets its own."""
    words = hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()
    number = int.from_bytes(words[:4])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(int.from_bytes(words[:8], signed=True))


def scaler_facts(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """Loss scale and the steps since it grew; empty unless fp16. JSON keeps both exactly: the scale is a power of two."""
    facts = scaler.state_dict()
    return {key: facts[key] for key in ("scale", "_growth_tracker") if key in facts}


def load_scaler(scaler: torch.amp.GradScaler, facts: Mapping[str, Any]) -> None:
    if facts and scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), **facts})
