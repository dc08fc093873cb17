"""What is looked at: this machine, and the training that is meant to run on it or on its cluster."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt2hpc.checks.programs import in_time
from gpt2hpc.cluster import dist_env
from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.config import Config
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.checkpoint import ASSUMED_BYTES_PER_S


@dataclass(frozen=True)
class Scene:
    """All that a check may depend on.

    Args:
        env: The environment.
        site: The cluster's ways; empty where there is no profile.
        asked: What sbatch would be asked for, by its long options.
        image: The container image that jobs would run in, absolute, whether it exists or not; or its name in a registry.
        run: The run directory, whether it exists or not.
        config: The run's settings, a preset's, or the defaults.
        data: Where the data is, if that was said.
        nodes: Nodes of a job.
        gpus_per_node: GPUs on each, if any are asked for.
        wants_gpu: A GPU is due on this very machine.
    """

    env: Mapping[str, str]
    site: Site = field(default_factory=Site)
    asked: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None
    run: RunDir = field(default_factory=lambda: RunDir(Path("runs/train")))
    config: Config = field(default_factory=Config)
    data: str | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    wants_gpu: bool = False

    @property
    def is_in_job(self) -> bool:
        """Whether this is a node that computes, in a job of Slurm's; the shell of `salloc` may be on a login node still."""
        return "SLURM_JOB_ID" in self.env and "SLURMD_NODENAME" in self.env

    @property
    def is_in_image(self) -> bool:
        return dist_env.is_in_image(self.env)

    @property
    def uses_pyxis(self) -> bool:
        """Whether jobs run their image by srun itself."""
        return self.image is not None and self.site.runtime == "pyxis"

    @property
    def has_slurm(self) -> bool:
        return shutil.which("sbatch") is not None

    @property
    def is_login_node(self) -> bool:
        """Jobs are submitted here and run elsewhere."""
        return self.has_slurm and not self.is_in_job

    @property
    def gpus_allotted(self) -> bool:
        """Whether this job was given GPUs of this node's."""
        return self.is_in_job and dist_env.are_gpus_allotted(self.env)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and the optimizer's state, in fp32; of a run that has some, the largest."""
        sizes = [int(row["save_bytes"]) for row in self._saves]
        return max(sizes, default=self.config.state_bytes)

    @property
    def save_s(self) -> float:
        """Seconds that a save takes: the longest of this run, else what a trainer assumes too."""
        return max((row["save_s"] for row in self._saves), default=self.checkpoint_bytes / ASSUMED_BYTES_PER_S)

    @property
    def save_words(self) -> str:
        """The same, and whence it is known."""
        size = f"{self.checkpoint_bytes / 1e9:,.1f} GB"
        known = "as this run has measured" if self._saves else f"for {size} of {self.config.model.tag}"
        return f"a save takes about {self.save_s:.0f} s ({known})"

    @cached_property
    def _saves(self) -> list[dict[str, float]]:
        """Of the end of the run's metrics; none where its disk does not answer, which other checks say."""
        try:
            lines = in_time(lambda: _end_of(self.run.metrics)).splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            if b'"save_s"' in line and line.endswith(b"}") and line.startswith(b"{"):
                found.append(json.loads(line))
        return found


def _end_of(path: Path, size: int = 1 << 20) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read()
