"""The loss over a fixed set of tokens, the same for every world size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from gpt2hpc.data.loader import ValLoader
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training.batches import to_device
from gpt2hpc.training.precision import Precision


@torch.no_grad()
def validation_loss(
    model: GPT, loader: ValLoader, precision: Precision, beat: Callable[[], object] = lambda: None
) -> tuple[float, int]:
    """Mean loss in nats and the tokens it is over, summed in double precision over all ranks; every rank calls it.

    `beat` is called after each batch.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for windows, rows in loader:
        tokens, targets = to_device(windows, precision.device)
        targets[rows:] = -100
        with precision.autocast():
            loss = float(
                model(tokens, targets, reduction="sum")
            )  # no tensor stays, or each replay would be a new graph
        sums += torch.tensor([loss, rows * tokens.shape[1]], dtype=torch.float64)
        beat()
    dist.all_reduce(sums)
    model.train()
    loss_sum, count = sums.tolist()
    return loss_sum / count, int(count)
