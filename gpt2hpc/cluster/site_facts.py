"""What a login node tells about its cluster, asked without changing anything: Slurm, programs, modules, networks, disks."""

from __future__ import annotations

import getpass
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc.cluster import inventory, queries
from gpt2hpc.cluster.inventory import Association, Partition
from gpt2hpc.cluster.site_profile import OF_SIF

DISKS = ("SCRATCH", "WORK", "PROJECT")
"""Variables in which sites name their large disks."""
SUFFIXES = ("i", "-ib", "-ib0", "-hsn0")
"""By which sites name a node on its fast network."""
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Facts:
    """What was found.

    Args:
        settings: `scontrol show config`, by name.
        partitions: What sinfo tells.
        associations: What the user may submit under; None where Slurm keeps no accounts.
        default_account: Of those, the one that Slurm takes by itself.
        programs: Container programs that are on PATH here.
        pyxis: Whether srun has pyxis' options.
        modules: Modules whose names begin as container programs do; None where there is no `module`.
        interfaces: Names of the network interfaces of this machine that are not down.
        suffix: What of SUFFIXES makes a node's name another name that resolves.
        disks: Directories that are named by DISKS.
    """

    settings: Mapping[str, str]
    partitions: Sequence[Partition]
    associations: Sequence[Association] | None = None
    default_account: str | None = None
    programs: Sequence[str] = ()
    pyxis: bool = False
    modules: Sequence[str] | None = None
    interfaces: Sequence[str] = ()
    suffix: str | None = None
    disks: Sequence[str] = ()


def gather(env: Mapping[str, str]) -> Facts | None:
    """All of it; None where no Slurm answers."""
    found = inventory.partitions()
    settings = inventory.settings()
    if not found or not settings:
        return None
    user = getpass.getuser()
    interfaces = _interfaces()
    node = inventory.first_node()
    return Facts(
        settings=settings,
        partitions=found,
        associations=inventory.associations(user),
        default_account=inventory.default_account(user),
        programs=[program for program in OF_SIF if shutil.which(program)],
        pyxis=queries.has_option("srun", "--container-image"),
        modules=_modules(),
        interfaces=interfaces,
        suffix=_suffix(node) if node and any(name.startswith(("ib", "hsn")) for name in interfaces) else None,
        disks=[f"${name}" for name in DISKS if Path(env.get(name) or "/nowhere").is_dir()],
    )


def _modules() -> list[str] | None:
    """Modules of container programs, from a login shell: `module` is a function that the site's profile defines."""
    program = "type module >/dev/null 2>&1 || exit 3; module -t avail 2>&1"
    try:
        done = subprocess.run(
            ["bash", "-lc", program],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode == 3:
        return None
    names = (line.strip().removesuffix("(default)") for line in done.stdout.splitlines())
    return [name for name in names if re.match(r"(?i)(apptainer|singularity)[\w./+-]*$", name)]


def _interfaces() -> list[str]:
    names = [name for _, name in socket.if_nameindex()]
    return [name for name in names if _state(name) != "down"]


def _state(interface: str) -> str:
    try:
        return (Path("/sys/class/net") / interface / "operstate").read_text().strip()
    except OSError:
        return "unknown"


def _suffix(node: str) -> str | None:
    for suffix in SUFFIXES:
        try:
            socket.getaddrinfo(node + suffix, None)
        except OSError:
            continue
        return suffix
    return None
