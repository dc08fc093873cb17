"""Does all that a training needs load, in versions that gpt2hpc knows?"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from importlib import metadata

import gpt2hpc
from gpt2hpc.checks import python
from gpt2hpc.trials.bench import Bench, TrialError

PACKAGES = (
    *(
        "datasets",
        "huggingface_hub",
        "jsonargparse",
        "numpy",
        "packaging",
        "pyarrow.parquet",
        "rich",
        "safetensors.torch",
    ),
    *("submitit", "tiktoken", "torch.distributed", "transformers", "yaml"),
)
"""Those of pyproject.toml, with the extra `train`."""
OF_TRITON = ("gpt2hpc.model.block_kernels", "gpt2hpc.model.loss_kernel")
"""Which comes with torch for CUDA, and is not wanted elsewhere."""


def run(bench: Bench) -> str:
    """All of them, then every module of ours."""
    unwanted = () if importlib.util.find_spec("triton") else OF_TRITON
    names = [each.name for each in pkgutil.walk_packages(gpt2hpc.__path__, "gpt2hpc.")]
    ours = sorted(name for name in names if "__main__" not in name and name not in unwanted)
    failed = [failure for name in (*PACKAGES, *ours) if (failure := _failure(name))]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise TrialError(f"{failed[0]}{more}")
    unmet = list(python.unmet(_wanted(), extra=python.TRAIN))
    if unmet:
        raise TrialError("; ".join(unmet))
    return f"{len(PACKAGES)} packages and {len(ours)} modules of gpt2hpc {gpt2hpc.__version__}; torch {metadata.version('torch')}"


def _failure(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except BaseException as error:  # a library may do anything when it is imported, even exit
        return f"{name} does not load ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


def _wanted() -> list[str]:
    """None where gpt2hpc is run from its sources, and no versions are asked for."""
    try:
        return metadata.requires("gpt2hpc") or []
    except metadata.PackageNotFoundError:
        return []
