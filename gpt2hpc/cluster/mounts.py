"""What of the host a container sees: each directory, and why. The script itself mounts what is here described."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gpt2hpc.cluster.site_profile import Site

BY_ITSELF = {
    "apptainer": "the home directory, /tmp, /proc, /sys, /dev (Apptainer's own, unless the site forbids it)",
    "singularity": "the home directory, /tmp, /proc, /sys, /dev (Singularity's own, unless the site forbids it)",
    "docker": "/tmp (for compilers' caches; of the home directory, nothing), and the host's network and shared memory",
    "pyxis": "/tmp (for compilers' caches; of the home directory, nothing)",
}


def described(site: Site, image: str | None, named: Iterable[tuple[str, str]], gpus: bool) -> list[str]:
    """For a dry run: a line for each mount; `named` are paths that the job needs, each with its why."""
    if image is None:
        return ["none, for there is no container"]
    wanted = [(str(Path.cwd()), "the directory that you submit from"), *named]
    lines = []
    for path, why in wanted:
        lines.append(f"{path} ({why})")
        leads_to = os.path.realpath(path)
        if leads_to != path:
            lines.append(f"{leads_to} (where {path} leads to)")
    lines += [f"{bind} (site: binds)" for bind in site.binds]
    if gpus and site.runtime != "pyxis":
        lines.append(f"drivers and devices of the GPUs ({'--gpus all' if site.runtime == 'docker' else '--nv'})")
    return [*lines, BY_ITSELF.get(site.runtime, "")]
