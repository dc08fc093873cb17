"""What images are built of: this checkout, a base system, wheels. Made once below a folder, and again for other sources.

The machine needs its own apt and pip sources; a build then needs no network.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from pathlib import Path

from tests.container import debian, machine

ROOT = Path(__file__).parents[2]
WHERE = Path("/var/cache/gpt2hpc-tests")
LOCK = "docker/requirements.lock"
INSTALLED = ("docker/install.sh", LOCK, "pyproject.toml", "README.md", "LICENSE", "gpt2hpc")
"""What comes into an image, besides the file that says how it is built."""
BASE = "ca-certificates g++ gcc ibverbs-providers libc6-dev libibverbs1 libnuma1 librdmacm1 python3 python3-dev python3-venv"
TORCH = os.environ.get("TORCH") or "torch==2.13.0"
KEPT = 3


def base_rootfs(where: Path = WHERE) -> Path:
    """This machine's Debian as a folder, with what the image needs from apt: the build then needs no network."""
    return machine.once(where / f"rootfs-{fingerprint()}", lambda root, final: debian.fill_rootfs(root, BASE))


def wheels(where: Path = WHERE) -> Path:
    """A folder with all that pip needs to install the project for the base system's Python."""
    python = (base_rootfs(where) / "usr/bin/python3").readlink().name.removeprefix("python")
    named = f"wheels-{python}-{fingerprint(LOCK)}"
    return machine.once(where / named, lambda folder, final: _fill_wheels(folder, python))


def arguments(base: str | Path) -> dict[str, str]:
    """What both build files are given for a build from these parts."""
    return {
        "BASE_IMAGE": str(base),
        "TORCH_SPEC": shlex.split(TORCH)[-1],
        "PIP_OPTIONS": "--no-index --find-links=/mnt",
        "VCS_REF": "0123abc",
    }


def copy(folder: Path, *names: str) -> None:
    """These files and folders of the checkout."""
    for each in names:
        source, target = ROOT / each, folder / each
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def fingerprint(*inputs: str) -> str:
    """Of these files of the project, and of what else decides what is made of them."""
    digest = hashlib.sha256(f"{TORCH}\n{BASE}\n{debian.codename()}\n".encode())
    for each in inputs:
        path = ROOT / each
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def discard_old(where: Path, *patterns: str) -> None:
    """All but the youngest few that fit a pattern."""
    for pattern in patterns:
        for old in sorted(where.glob(pattern), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            machine.run(["rm", "-rf", old])


def _fill_wheels(folder: Path, python: str) -> None:
    """By the machine's own pip configuration: torch, with its dependencies, from its own index, and what the lock names."""
    pip = [sys.executable, *["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]]
    pip += ["--dest", str(folder), "--python-version", python]
    with machine.step("download wheels"):
        machine.run([*pip, "--constraint", str(ROOT / "constraints.txt"), *shlex.split(TORCH)])
        machine.run([*pip, "--no-deps", "--require-hashes", "--requirement", str(ROOT / LOCK)])
