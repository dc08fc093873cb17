"""Windows of tokens on their way to the device, and a record of which ones a rank took."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from gpt2hpc.data.loader import Slice
from gpt2hpc.data.shards import Tokens


def to_device(windows: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows shaped (rows, block_size + 1); both (rows, block_size), int64.

    Each is a tensor of its own with the strides of a new one, also where there is but one row, which counts as contiguous whatever
    its strides: torch.compile, which looks at them, would compile again what the warm-up has compiled.
    """
    if device.type == "cuda":  # a quarter of the bytes over the bus, and no wait
        moved = torch.from_numpy(windows).pin_memory().to(device, non_blocking=True).long()
    else:
        moved = torch.from_numpy(windows.astype("int64")).to(device)
    inputs, targets = (part.clone(memory_format=torch.contiguous_format) for part in (moved[:, :-1], moved[:, 1:]))
    return inputs, targets


def trace(path: Path, part: Slice, *, step: int, consumed: int, micro_step: int) -> None:
    """Append the sample numbers of a micro batch of `step` to `path`, a JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    facts = {
        "step": step,
        "micro_step": micro_step,
        "world_size": part.world_size,
        "samples": part.micro_batch(consumed, micro_step).tolist(),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
