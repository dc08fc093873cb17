"""The Python that trains: the image's, the site's, or this one. It is asked in a process of its own, for torch may hang or abort."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from gpt2hpc import __version__
from gpt2hpc.checks import python
from gpt2hpc.checks.programs import ask
from gpt2hpc.checks.scene import Scene
from gpt2hpc.finding import Finding, missing, ok, warn

PATIENCE_S = 90.0
"""A first import of torch from a busy shared disk takes a minute."""
MARK = "gpt2hpc-probe:"
OF_PYXIS = "pyxis runs it in a job alone"
PROBE = r"""
import ctypes, gc, json, os, sys
gc.disable()
facts = {"python": "%d.%d.%d" % sys.version_info[:3]}
try:
    ctypes.CDLL("libibverbs.so.1")
    facts["libibverbs"] = True
except OSError:
    facts["libibverbs"] = False
try:
    import gpt2hpc
    facts["gpt2hpc"] = gpt2hpc.__version__
except Exception as error:
    facts["gpt2hpc_error"] = "%s: %s" % (type(error).__name__, error)
try:
    import torch
    facts["torch"] = torch.__version__
    facts["cuda"], facts["hip"] = torch.version.cuda, getattr(torch.version, "hip", None)
    facts["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    facts["nccl"] = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if torch.cuda.is_available():
        facts["gpus"] = torch.cuda.device_count()
        facts["capabilities"] = sorted({torch.cuda.get_device_capability(n) for n in range(facts["gpus"])})
        facts["architectures"] = torch.cuda.get_arch_list()
        if facts["nccl"] and not facts["hip"]:
            facts["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
except Exception as error:
    facts["torch_error"] = "%s: %s" % (type(error).__name__, error)
print("gpt2hpc-probe:" + json.dumps(facts), flush=True)
os._exit(0)  # all is said, and torch is slow to go
"""


@dataclass(frozen=True)
class Facts:
    """What the Python that trains says of itself; all but `python` may be lacking.

    Args:
        python: Its version.
        gpt2hpc: The version of ours that it imports.
        torch: Its version; `torch_error` says why there is none.
        cuda: The CUDA that torch was built for; None for a CPU build.
        hip: The same of ROCm.
        gpus: That torch can use here.
        capabilities: Compute capabilities of these, each once.
        architectures: What torch was built for, as `sm_90`, `compute_90`; empty where no GPU is there to ask for.
        libibverbs: Whether NCCL would find InfiniBand's library.
    """

    python: str
    libibverbs: bool
    gpt2hpc: str | None = None
    gpt2hpc_error: str | None = None
    torch: str | None = None
    torch_error: str | None = None
    cuda: str | None = None
    hip: str | None = None
    gloo: bool = False
    nccl: bool = False
    nccl_version: str | None = None
    gpus: int = 0
    capabilities: Sequence[Sequence[int]] = field(default_factory=tuple)
    architectures: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Probe:
    """The facts, or why there are none."""

    facts: Facts | None
    failure: str = ""


def command(scene: Scene, *, nv: bool) -> list[str]:
    """How Python is run in a job, as the batch script does it."""
    if scene.image is None:
        return [scene.site.python or sys.executable]
    if scene.site.runtime == "docker":
        return ["docker", "run", "--rm", *(["--gpus", "all"] if nv else []), "--entrypoint", "python3", scene.image]
    binds = [word for path in scene.site.binds if Path(path.partition(":")[0]).exists() for word in ("--bind", path)]
    return [scene.site.runtime, "--quiet", "exec", *(["--nv"] if nv else []), *binds, scene.image, "python3"]


def probe(scene: Scene) -> Probe:
    """Ask it; not an image of pyxis', which would take a step of a job."""
    if scene.uses_pyxis:
        return Probe(None, OF_PYXIS)
    hidden = ("PYTHONPATH", "PYTHONHOME", "APPTAINER_CLEANENV", "SINGULARITY_CLEANENV") if scene.image else ()
    env = {name: value for name, value in scene.env.items() if name not in hidden}
    words = command(scene, nv=Path("/dev/nvidiactl").exists())
    answer = ask([*words, "-c", PROBE], patience_s=PATIENCE_S, env=env)
    if answer is None:
        return Probe(None, f"{words[0]} is not here")
    line = next((line for line in answer.out.splitlines() if line.startswith(MARK)), None)
    if line is None:
        return Probe(None, answer.words)
    return Probe(Facts(**json.loads(line.removeprefix(MARK))))


def look(scene: Scene, found: Probe) -> list[Finding]:
    where = f"the image {scene.image}" if scene.image else scene.site.python or "this Python"
    name = "python of ranks"
    facts = found.facts
    if facts is None and found.failure == OF_PYXIS:
        ask_it = f"srun -N1 --container-image={scene.image} python3 -m gpt2hpc doctor"
        return [warn(name, f"{where} is not asked, for {OF_PYXIS}: `{ask_it}`")]
    if facts is None:
        if scene.image and ("is not here" in found.failure or not os.path.exists(scene.image)):  # noqa: PTH110
            return [warn(name, f"{where} cannot be asked from here")]  # what is lacking, the container's checks say
        return [missing(name, f"{where} does not start: {found.failure}")]
    return [_ours(name, where, facts), _torch(where, facts, scene)]


def _ours(name: str, where: str, facts: Facts) -> Finding:
    if facts.gpt2hpc is None:
        return missing(name, f"{where} does not import gpt2hpc ({facts.gpt2hpc_error}); install it there")
    if facts.gpt2hpc != __version__:
        text = f"{where} has gpt2hpc {facts.gpt2hpc}, and here it is {__version__}, which writes what it reads: make them the same"
        return missing(name, text)
    return ok(name, f"{where}: Python {facts.python}, gpt2hpc {facts.gpt2hpc}")


def _torch(where: str, facts: Facts, scene: Scene) -> Finding:
    if facts.torch is None:
        lacking = facts.torch_error or ""
        mend = "pip install 'gpt2hpc[train]'"
        if "No module named 'torch'" not in lacking:
            return missing("torch", f"{where} has one that does not load ({lacking}); install it again: {mend}")
        if scene.image is None and scene.has_slurm:
            mend += ", or name what jobs run in: an image by --container or in a site profile, or another Python by `python:` there"
        return missing("torch", f"{where} has none; {mend}")
    if scene.image is None and scene.site.python is None:
        try:
            lacking_here = list(python.unmet(metadata.requires("gpt2hpc") or [], extra=python.TRAIN))
        except metadata.PackageNotFoundError:
            lacking_here = []
        if lacking_here:
            return missing(
                "torch", f"{facts.torch}, but {'; '.join(lacking_here)}; pip install --upgrade 'gpt2hpc[train]'"
            )
    if not facts.gloo:
        return missing("torch", f"{facts.torch} has no gloo, by which ranks agree; install another build of it")
    return ok("torch", f"{facts.torch}, {build(facts)}")


def build(facts: Facts) -> str:
    """What torch was built for."""
    if facts.cuda:
        return f"built for CUDA {facts.cuda}"
    return f"built for ROCm {facts.hip}" if facts.hip else "a CPU build"
