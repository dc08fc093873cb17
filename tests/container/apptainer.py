"""A real Apptainer, and the project's image built with it, on a Debian machine with neither an engine nor a registry.

The machine needs root to install, and its own apt and pip sources; everything runs as an unprivileged user. What is
made lies below WHERE and is made once: the tools, a base system, wheels, and an image per state of the sources.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tests.container import debian, machine

ROOT = Path(__file__).parents[2]
WHERE = Path("/var/cache/gpt2hpc-tests")
INPUTS = ("apptainer.def", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "gpt2hpc")
TOOLS = "ca-certificates fakeroot fuse3 iproute2 mmdebstrap patchelf python3-venv squashfs-tools squashfuse tzdata uidmap util-linux"
BASE = "ca-certificates g++ gcc ibverbs-providers libc6-dev libibverbs1 libnuma1 librdmacm1 python3 python3-dev python3-venv"
TORCH = os.environ.get("TORCH") or "torch==2.13.0"
KEPT = 3


def lacking() -> str | None:
    """Why there can be no Apptainer on this machine; None where there can."""
    if os.geteuid() != 0:
        return "this is not root, who installs Apptainer and makes an unprivileged user for it"
    if platform.freedesktop_os_release().get("ID") != "debian" or not shutil.which("apt-get"):
        return "this is no Debian: the base system, and Apptainer where there is none, come from Debian's packages"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse: images cannot be mounted"
    if subprocess.run(["unshare", "-Ur", "true"], user=65534, group=65534, capture_output=True).returncode:
        return "an unprivileged user may not make a user namespace"
    return None


def install(where: Path = WHERE / "apptainer") -> Path:
    """The folder that holds the `apptainer` command: the machine's own, or one made below `where`."""
    absent = [name for name in TOOLS.split() if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode]
    if absent:
        with machine.step(f"apt-get install {' '.join(absent)}"):
            subprocess.run(["apt-get", "update"], capture_output=True)  # one source of many may be down
            machine.run(
                ["apt-get", "install", "-y", "--no-install-recommends", *absent],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
    Path("/dev/fuse").chmod(0o666)
    own = shutil.which("apptainer")
    return Path(own).parent if own else machine.once(where, debian.fill_apptainer) / "usr" / "bin"


def base_rootfs(where: Path = WHERE) -> Path:
    """This machine's Debian as a folder, with what the image needs from apt: the build then needs no network."""
    return machine.once(where / f"rootfs-{_fingerprint()}", lambda root, final: debian.fill_rootfs(root, BASE))


def wheels(where: Path = WHERE) -> Path:
    """A folder with all that pip needs to install the project for the base system's Python."""
    python = (base_rootfs(where) / "usr/bin/python3").readlink().name.removeprefix("python")
    named = f"wheels-{python}-{_fingerprint('pyproject.toml', 'constraints.txt')}"
    return machine.once(where / named, lambda folder, final: _fill_wheels(folder, python))


def login_python(where: Path = WHERE) -> Path:
    """A Python as a login node has it: Debian's, with the project but without torch."""

    def fill(folder: Path, final: Path) -> None:
        machine.run(["/usr/bin/python3", "-m", "venv", folder])
        for each in INPUTS:
            _copy(ROOT / each, folder / "source" / each)
        pip = [
            folder / "bin" / "python3",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-index",
        ]
        machine.run([*pip, f"--find-links={wheels(where)}", folder / "source"])

    with machine.step("a login node's Python"):
        return machine.once(where / f"login-{_fingerprint(*INPUTS)}", fill) / "bin" / "python3"


def build(where: Path = WHERE) -> Path:
    """The image of the project as it is now, built by the unprivileged user; an unchanged project is not built again."""
    image = where / f"gpt2hpc-{_fingerprint(*INPUTS)}.sif"
    if image.exists():
        return image
    apptainer, rootfs = install(where / "apptainer"), base_rootfs(where)
    offline_wheels = wheels(where)
    with tempfile.TemporaryDirectory(dir=where, prefix="build-") as name, machine.step("build the image"):
        workshop = Path(name)
        for each in INPUTS:
            _copy(ROOT / each, workshop / each)
        owner = machine.user()
        machine.run(["chown", "-R", f"{owner.pw_uid}:{owner.pw_gid}", workshop])
        offline = "--no-cache-dir --no-index --find-links=/mnt"
        given = {"BOOTSTRAP": "localimage", "FROM": rootfs, "TORCH": shlex.split(TORCH)[-1], "PIP_OPTIONS": offline}
        options = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
        options += [
            "--bind",
            f"{offline_wheels}:/mnt",
            "--mksquashfs-args",
            "-Xcompression-level 1",
        ]  # quick, not small
        command = machine.as_user(apptainer / "apptainer", "build", *options, "new.sif", "apptainer.def")
        machine.run(command, cwd=workshop, env={**machine.user_environment(), "APPTAINER_TMPDIR": name})
        os.chown(workshop / "new.sif", 0, 0)
        (workshop / "new.sif").rename(image)
    for pattern in ("gpt2hpc-*.sif", "wheels-*", "rootfs-*", "login-*", "gpt2hpc-*.d"):
        for old in sorted(where.glob(pattern), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            machine.run(["rm", "-rf", old])
    return image


def unpacked(image: Path) -> Path:
    """The image as a directory: what runs where Slurm signals the process that serves an image's files."""

    def fill(folder: Path, final: Path) -> None:
        os.chown(folder, machine.user().pw_uid, machine.user().pw_gid)
        command = machine.as_user(install() / "apptainer", "build", "--sandbox", folder / "root", image)
        machine.run(command, cwd="/", env={**machine.user_environment(), "APPTAINER_TMPDIR": str(folder)})

    return machine.once(image.with_suffix(".d"), fill) / "root"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def _fill_wheels(folder: Path, python: str) -> None:
    """Everything that pip will want in the image, by the machine's own pip configuration, torch from its own index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["train"], *extras["fast"]]
    wanted = [each for each in wanted if not each.startswith("torch")] + project["build-system"]["requires"]
    pip = [sys.executable, *["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]]
    pip += ["--dest", str(folder), "--python-version", python, "--constraint", str(ROOT / "constraints.txt")]
    with machine.step("download wheels"):
        machine.run([*pip, *shlex.split(TORCH)])
        machine.run([*pip, *wanted])


def _fingerprint(*inputs: str) -> str:
    """Of these files of the project, and of what else decides what is made of them."""
    digest = hashlib.sha256(f"{TORCH}\n{BASE}\n{debian.codename()}\n".encode())
    for each in inputs:
        path = ROOT / each
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]
