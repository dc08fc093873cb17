"""A real Apptainer, and images built with it, on a Debian machine with neither an engine nor a registry.

The machine needs root to install; everything runs as an unprivileged user. What is made lies below WHERE and is made
once: the tools, and an image per state of the sources.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.container import debian, machine, parts
from tests.container.parts import WHERE

DEFINITION = "apptainer.def"
INPUTS = (DEFINITION, *parts.INSTALLED)
TOOLS = "ca-certificates fakeroot fuse3 iproute2 mmdebstrap patchelf python3-venv squashfs-tools squashfuse tzdata uidmap util-linux"
QUICK_NOT_SMALL = ("--mksquashfs-args", "-Xcompression-level 1")

TOKEN = "hf_planted1234567890"
"""In the environment of builds, and of jobs: it opens nothing, and may be found nowhere afterwards."""


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
    debian.install(*TOOLS.split())
    Path("/dev/fuse").chmod(0o666)
    own = shutil.which("apptainer")
    return Path(own).parent if own else machine.once(where, debian.fill_apptainer) / "usr" / "bin"


def login_python(where: Path = WHERE) -> Path:
    """A Python as a login node has it: Debian's, with the project but without torch."""

    def fill(folder: Path, final: Path) -> None:
        machine.run(["/usr/bin/python3", "-m", "venv", folder])
        parts.copy(folder / "source", *INPUTS)
        pip: list[str | Path] = [
            folder / "bin/python3",
            *("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"),
        ]
        machine.run([*pip, f"--find-links={parts.wheels(where)}", folder / "source"])

    with machine.step("a login node's Python"):
        return machine.once(where / f"login-{parts.fingerprint(*INPUTS)}", fill) / "bin" / "python3"


def build(where: Path = WHERE) -> Path:
    """The image of the project as it is now; an unchanged project is not built again."""
    image = where / f"gpt2hpc-{parts.fingerprint(*INPUTS)}.sif"
    if not image.exists():
        given = {"BOOTSTRAP": "localimage", **parts.arguments(parts.base_rootfs(where), wheels_at="/mnt")}
        options = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
        wheels = parts.wheels(where)
        with machine.step("build the image by apptainer.def"):
            _build(image, *options, "--bind", f"{wheels}:/mnt", source=DEFINITION, needs=INPUTS)
        parts.discard_old(where, "gpt2hpc-*.sif", "wheels-*", "rootfs-*", "login-*")
    return image


def from_archive(archive: Path, image: Path) -> Path:
    """The image that an engine built, as a file of Apptainer's."""
    if not image.exists():
        with machine.step("docker-archive to SIF"):
            _build(image, source=f"docker-archive:{archive}")
    return image


def _build(image: Path, *options: str, source: str, needs: tuple[str, ...] = ()) -> None:
    """By the unprivileged user, from a copy of what it needs of the checkout."""
    program = install(image.parent / "apptainer") / "apptainer"
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="build-") as name:
        workshop = Path(name)
        parts.copy(workshop, *needs)
        owner = machine.user()
        machine.run(["chown", "-R", f"{owner.pw_uid}:{owner.pw_gid}", workshop])
        command = machine.as_user(program, "build", *QUICK_NOT_SMALL, *options, "new.sif", source)
        environment = {**machine.user_environment(), "APPTAINER_TMPDIR": name, "HF_TOKEN": TOKEN}
        machine.run(command, cwd=workshop, env=environment)
        os.chown(workshop / "new.sif", 0, 0)
        (workshop / "new.sif").rename(image)
