"""What torch allocates in a step on the CPU, byte by byte."""

from __future__ import annotations

import torch

from gpt2hpc.config import ModelConfig
from gpt2hpc.model.gpt import GPT


class Step:
    """Forward and backward of a model whose gradients are there already, as in all micro batches but the first."""

    def __init__(self, shape: ModelConfig, *, sixteen_bits: bool = False, recomputes: bool = False) -> None:
        torch.manual_seed(0)
        self._model, self._sixteen_bits = GPT(shape, recomputes=recomputes), sixteen_bits
        self._forward(1).backward()

    def peak_bytes(self, micro_batch: int) -> int:
        """The most above what was there before: all that the allocator gave, as the profiler has it, temporary memory too."""
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            self._forward(micro_batch).backward()
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        live = most = 0
        for _, change in sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"):
            live += change
            most = max(most, live)
        return most

    def saved_bytes(self, micro_batch: int) -> int:
        """What autograd holds between forward and backward, but for the parameters."""
        own = {parameter.untyped_storage()._cdata for parameter in self._model.parameters()}
        held: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                held[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._forward(micro_batch)
        del loss
        return sum(held.values())

    def _forward(self, micro_batch: int) -> torch.Tensor:
        tokens = torch.zeros(micro_batch, self._model.config.block_size, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._sixteen_bits):
            loss: torch.Tensor = self._model(tokens, tokens)
        return loss
