"""This Python: its packages against what gpt2hpc asks for, and packages that leak in from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import site
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from gpt2hpc import __version__
from gpt2hpc.checks.scene import Scene
from gpt2hpc.finding import Finding, missing, ok, warn

TRAIN = "train"


def look(scene: Scene) -> list[Finding]:
    return [_itself(), *_packages(), *_leaks(scene), *_reach(scene)]


def _itself() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return ok("python", f"{version}, {sys.executable}, gpt2hpc {__version__}")


def _packages() -> list[Finding]:
    """What is installed against the ranges in pyproject.toml; without the extras, which other checks ask for."""
    try:
        wanted = metadata.requires("gpt2hpc") or []
    except metadata.PackageNotFoundError:
        return [
            warn("packages", "gpt2hpc is not installed here but run from its sources; `pip install .` checks versions")
        ]
    wrong = list(unmet(wanted))
    if wrong:
        return [missing("packages", f"{'; '.join(wrong)}; pip install --upgrade gpt2hpc")]
    return [ok("packages", "all that gpt2hpc asks for, in versions that it knows")]


def unmet(wanted: Iterable[str], extra: str = "") -> Iterable[str]:
    """Of requirements as package metadata writes them (PEP 508), those that what is installed does not meet."""
    from packaging.requirements import Requirement

    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{requirement.name} is not installed"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is not {requirement.specifier}"


def _leaks(scene: Scene) -> list[Finding]:
    found = []
    if path := scene.env.get("PYTHONPATH"):
        text = f"{path} comes before what is installed, in jobs too; unset it, unless you mean it"
        found.append(warn("PYTHONPATH", text))
    home = Path(site.getusersitepackages())
    if strays := [name for name in _own_packages() if _origin(name, home)]:
        text = f"{', '.join(strays)} come from {home}, whatever is installed; export PYTHONNOUSERSITE=1, or uninstall them there"
        found.append(warn("~/.local", text))
    conda = scene.env.get("CONDA_PREFIX")
    if conda and not Path(sys.prefix).is_relative_to(conda):
        text = f"{conda} is active, but this Python is {sys.prefix}; `conda deactivate`, or libraries of both may mix"
        found.append(warn("conda", text))
    libraries = [each for each in scene.env.get("LD_LIBRARY_PATH", "").split(os.pathsep) if "cuda" in each.lower()]
    if libraries:
        text = f"LD_LIBRARY_PATH has {libraries[0]}, which may stand in for the CUDA libraries that torch brings; unload that module"
        found.append(warn("LD_LIBRARY_PATH", text))
    return found


def _own_packages() -> list[str]:
    return ["torch", "numpy", "tiktoken", "datasets", "huggingface_hub", "submitit", "yaml", "safetensors"]


def _origin(name: str, folder: Path) -> bool:
    """Whether a package would be imported from below that folder; nothing is imported for that."""
    spec = importlib.util.find_spec(name)
    return bool(spec and spec.origin and Path(spec.origin).is_relative_to(folder))


def _reach(scene: Scene) -> list[Finding]:
    """Jobs run this very Python, where there is no image and no other: is it where nodes can see it?"""
    if not scene.is_login_node or scene.image or scene.site.python:
        return []
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        if Path(sys.prefix).is_relative_to(place):
            text = f"{sys.prefix} is on this machine's own {place}, and jobs run it on other nodes; install gpt2hpc on a shared disk"
            return [warn("python of jobs", text)]
    return [ok("python of jobs", f"{sys.executable}, which every node must see")]
