"""Where a trial takes place, and how one fails."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Bench:
    """All that a trial may depend on.

    Args:
        device: What is tried.
        folder: A directory of the trial's own, the only place where it writes.
        gpus: That a process here would see; 0 where the CPU is tried.
    """

    device: Device
    folder: Path
    gpus: int

    def torch_device(self) -> torch.device:
        """As a training would choose it; MissingError where that is a GPU which cannot be used."""
        from gpt2hpc.cluster.dist_env import DistEnv
        from gpt2hpc.training.process_group import select_device

        return select_device(self.device, DistEnv.from_env(os.environ))


class TrialError(Exception):
    """What was tried went wrong; the text says how."""
