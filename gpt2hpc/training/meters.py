"""How much memory some work takes at the most, and how much there is: on a GPU, and on this machine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch

from gpt2hpc.cluster import host_memory
from gpt2hpc.training import heap

SHARE_OF_GPU = 0.92
"""That a trial may reserve of what is free: DDP, NCCL and torch.compile take some too, and memory comes to lie in pieces."""
SHARE_OF_HOST = 0.8
"""Of what is available, which other processes take from as well."""
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Meter(Protocol):
    """Measures what work needs of a device, and knows what there is."""

    limit_bytes: int
    proves: bool
    """Whether too much is an error that can be caught."""

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """The most that was taken in `work`, with all that was there before; None where there was not enough."""


class CudaMeter:
    proves = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free, _ = torch.cuda.mem_get_info(device)
        self.limit_bytes = int(SHARE_OF_GPU * (free + torch.cuda.memory_reserved(device)))

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        if not _fits(work):
            return None
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)


class HostMeter:
    """Of `sharers` ranks on a node, each of which needs `kept_bytes` later besides: the copy of its share of a checkpoint."""

    proves = False

    def __init__(self, available_bytes: int, *, sharers: int, kept_bytes: int) -> None:
        own = int(SHARE_OF_HOST * available_bytes / sharers) - kept_bytes
        self.limit_bytes = host_memory.resident_bytes() + own

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        return host_memory.most_resident_bytes() if _fits(work) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had no memory left for a tensor."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _fits(work: Callable[[], object]) -> bool:
    try:
        work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    gc.collect()  # what the error's frames held
    return False


def free(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        heap.give_back()
