"""What Debian's packages give: Apptainer, and a base system. The mirror is the one of the machine's own apt sources."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from tests.container import machine

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LIBRARIES = "libc6 libgcc-s1 libseccomp2 libsqlite3-0 libfuse3-4 libzstd1 liblzma5 zlib1g liblz4-1 liblzo2-2"


def install(*packages: str) -> None:
    """Those of them that the machine has not yet."""
    absent = [name for name in packages if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode]
    if absent:
        with machine.step(f"apt-get install {' '.join(absent)}"):
            subprocess.run(["apt-get", "update"], capture_output=True)  # one source of many may be down
            machine.run(
                ["apt-get", "install", "-y", "--no-install-recommends", *absent],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )


def codename() -> str:
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def mirror() -> str:
    """Where this machine's apt takes its Debian from."""
    query = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    for attempt in ("as it is", "updated"):
        if attempt == "updated":  # only what was fetched is listed, and images of Debian come without
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        for line in machine.run(query).splitlines():
            uri, release, component = line.split()
            if (release, component) == (codename(), "main"):
                return uri
    raise RuntimeError(f"no apt source of this machine has {codename()} main")


def fill_apptainer(root: Path, final: Path) -> None:
    """Debian's sid has the package, trixie the libraries; its own loader and libraries keep it off the machine's."""
    state = root / "apt"
    (state / "lists").mkdir(parents=True)
    sources = [f"deb [signed-by={KEYRING}] {mirror()} {suite} main" for suite in ("sid", "trixie")]
    (state / "sources.list").write_text("\n".join(sources) + "\n")
    settings = {
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": state / "lists",
        "Dir::Cache": state,
        "Acquire::Check-Valid-Until": "false",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    with machine.step("download Apptainer"):
        machine.run([*apt, "update"])
        machine.run([*apt, "download", "apptainer/sid", *(f"{name}/trixie" for name in LIBRARIES.split())], cwd=state)
    for package in state.glob("*.deb"):
        machine.run(["dpkg", "-x", package, root])
    shutil.rmtree(state)
    for prefix in ("usr", "usr/lib"):  # where its two programs look, once they find themselves moved
        for name in ("etc", "var"):
            (root / prefix / name).symlink_to(os.path.relpath(root / name, root / prefix))
    loader, libseccomp = next(root.glob("usr/lib*/ld-linux-*")), next(root.glob("usr/lib/*/libseccomp.so.2"))
    for program in (root / "usr/bin/apptainer", next(root.glob("usr/lib/*/apptainer/bin/starter"))):
        # --force-rpath: a RUNPATH would not reach the libraries' own libraries
        interpreter, rpath = final / loader.relative_to(root), final / libseccomp.parent.relative_to(root)
        machine.run(["patchelf", "--set-interpreter", interpreter, "--force-rpath", "--set-rpath", rpath, program])


def fill_rootfs(root: Path, packages: str) -> None:
    """The machine's own release, with these packages."""
    include = f"--include={','.join(packages.split())}"
    with machine.step("mmdebstrap, the base system"):
        machine.run(["mmdebstrap", "--variant=minbase", include, codename(), root, mirror()])
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()
    machine.run(["chmod", "-R", "a+rX", root])
