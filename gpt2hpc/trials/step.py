"""A tiny GPT-2 forward and backward: is the loss that of one which knows nothing, and are there gradients?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpt2hpc.config import ModelConfig
from gpt2hpc.model import fused_loss
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import precision
from gpt2hpc.training.precision import Precision
from gpt2hpc.trials.bench import Bench, TrialError

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64)
BATCH = 2
CLOSE = 0.05
"""Of a gradient's norm, in 16 bits."""
FUSED = ModelConfig(n_layer=2, n_head=2, n_embd=96, block_size=256, vocab_size=1000, padded_vocab_size=1024)
FUSED_BATCH = 32
"""As many tokens as let a program of each kernel go over several rows, on a GPU of up to 250 multiprocessors."""
SLACK = 0.2
"""In nats; weights from N(0, 0.02) make a few hundredths."""


def run(bench: Bench) -> str:
    """In the precision that a training would choose."""
    chosen = precision.choose("auto", bench.torch_device())
    model = new_model(chosen.device)
    loss = backward(model, chosen)
    expected = math.log(SHAPE.vocab_size)
    if not abs(loss - expected) < SLACK:  # which NaN is not either
        raise TrialError(
            f"the loss of random weights is {loss:.4f}, and should be near ln({SHAPE.vocab_size}) = {expected:.2f}"
        )
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.abs().max() > 0:
            raise TrialError(f"the gradient of {name} is absent, zero or not finite")
    dtype = str(chosen.dtype).removeprefix("torch.")
    fused = _fused(chosen) if fused_loss.suits(chosen.device, chosen.dtype) else ""
    return f"loss {loss:.3f}, near ln({SHAPE.vocab_size}) = {expected:.3f}, in {dtype} {_on(chosen.device)}{fused}"


def _fused(chosen: Precision) -> str:
    """The kernels that trainings on this GPU use, beside torch's operators; TrialError where they come to something else."""
    plain, model = (_perturbed(new_model(chosen.device, FUSED)) for _ in range(2))
    model.fuse()
    expected, loss = (backward(each, chosen, batch=FUSED_BATCH) for each in (plain, model))
    if not abs(loss - expected) < CLOSE:
        raise TrialError(f"by fused operators the loss is {loss:.4f}, and {expected:.4f} by torch's operators")
    for (name, own), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        if not (own.grad - other.grad).norm() < CLOSE * other.grad.norm():
            raise TrialError(f"fused operators give {name} another gradient than torch's operators")
    return "; the same with fused operators"


@torch.no_grad()
def _perturbed(model: GPT) -> GPT:
    """Always in the same way, so that no bias is zero and no norm's weight one."""
    source = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=source).to(parameter.device))
    return model


def new_model(device: torch.device, shape: ModelConfig = SHAPE) -> GPT:
    """The same weights each time."""
    torch.manual_seed(1337)
    return GPT(shape).to(device)


def backward(model: GPT, chosen: Precision, batch: int = BATCH) -> float:
    """The loss of one batch, always the same, whose gradients are then there."""
    tokens, targets = _batch(model.config, batch, chosen.device)
    with chosen.autocast():
        loss = model(tokens, targets)
    loss.backward()
    return float(loss.detach())


def _batch(shape: ModelConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(7)
    drawn = torch.randint(shape.vocab_size, (rows, shape.block_size + 1), generator=source).to(device)
    targets = drawn[:, 1:].clone()
    targets[0, :3] = fused_loss.IGNORED
    return drawn[:, :-1], targets


def _on(device: torch.device) -> str:
    return f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "on the CPU"
