"""torch.compile: does it compile here, to a step like the one that is not compiled?"""

from __future__ import annotations

import dataclasses

import torch
from torch._dynamo.utils import counters

from gpt2hpc.training import precision
from gpt2hpc.trials import step
from gpt2hpc.trials.bench import Bench, TrialError

SHAPE = dataclasses.replace(step.SHAPE, n_layer=1)
"""Another layer would cost the compiler seconds, and show nothing more."""
CLOSE = 1e-3
"""Of the largest gradient of a parameter; fused kernels add in another order."""


def run(bench: Bench) -> str:
    """In fp32, since a difference in bf16 would say little."""
    plain = precision.choose("fp32", bench.torch_device())
    torch.set_float32_matmul_precision("highest")
    eager, compiled = (step.new_model(plain.device, SHAPE) for _ in range(2))
    expected = step.backward(eager, plain)
    compiled.compile()  # as the trainer does it
    loss = step.backward(compiled, plain)
    graphs = counters["stats"]["unique_graphs"]
    if not graphs:
        raise TrialError(
            "torch.compile compiled nothing, without a word; is TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE set?"
        )
    if not abs(loss - expected) < CLOSE:
        raise TrialError(f"the compiled loss is {loss:.5f}, and {expected:.5f} without compiling")
    for (name, own), (_, other) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        if not (own.grad - other.grad).abs().max() < CLOSE * other.grad.abs().max():
            raise TrialError(f"the compiled gradient of {name} is another than without compiling")
    return f"compiled, with loss {loss:.3f} and the gradients of the eager one"
