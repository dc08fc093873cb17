"""docker/Dockerfile built by Debian's buildah, which needs no daemon, and what comes out in use as an engine has it.

Everything lies in a store of its own below WHERE; nothing is pulled, and the machine's own images are not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.container import debian, machine, parts
from tests.container.parts import WHERE

DOCKERFILE = "docker/Dockerfile"
INPUTS = (DOCKERFILE, ".dockerignore", *parts.INSTALLED)
SECRET = "planted-4d1c7b"
"""In the pip configuration that the build is given."""
TIMEOUT_S = 600


@dataclass(frozen=True)
class Store:
    """Images and containers in a folder."""

    folder: Path
    driver: str

    def command(self, *words: str | Path) -> list[str | Path]:
        """Of buildah, on this store."""
        place = ("--root", self.folder / "root", "--runroot", self.folder / "run", "--storage-driver", self.driver)
        return ["buildah", *place, *words]

    def __call__(self, *words: str | Path, **options: Any) -> str:
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        isolated = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder / "tmp")}
        return machine.run(self.command(*words), env=isolated, **options).strip()

    def has(self, image: str) -> bool:
        return image in self("images", "--format", "{{.Name}}:{{.Tag}}").split()

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[str]:
        """A container to run commands in."""
        name = self("from", "--pull-never", image)
        try:
            yield name
        finally:
            self("rm", name)

    @contextlib.contextmanager
    def mounted(self, container: str) -> Iterator[Path]:
        """Its root directory."""
        yield Path(self("mount", container))
        self("umount", container)


@dataclass(frozen=True)
class Engine:
    """`docker run --network none --user USER --volume HOME:/work IMAGE …`, as far as buildah has it."""

    store: Store
    image: str
    container: str
    prefix: tuple[str, ...]
    home: Path

    @property
    def config(self) -> dict[str, Any]:
        """What an engine reads: Env, Entrypoint, Cmd, User, Labels, WorkingDir."""
        facts = json.loads(self.store("inspect", "--type", "image", self.image))
        found: dict[str, Any] = facts["OCIv1"]["config"]
        return found

    @property
    def size_bytes(self) -> int:
        """Of all its layers."""
        number, unit = self.store("images", "--noheading", "--format", "{{.Size}}", self.image).split()
        return round(float(number) * {"MB": 1e6, "GB": 1e9}[unit])

    def run(
        self, *words: str, user: str | None = None, env: Mapping[str, str] | None = None, entrypoint: bool = True
    ) -> tuple[int, str]:
        """Exit code and output of the entry point with these words, or of the words alone."""
        config = self.config
        program = [*config["Entrypoint"], *(words or config["Cmd"])] if entrypoint else list(words)
        options = [f"--volume={self.home}:/work", *(f"--env={name}={value}" for name, value in (env or {}).items())]
        if user is not None:
            options.append(f"--user={user}")
        command = [*self.prefix, *self.store.command("run", *options, self.container, "--", *program)]
        done = subprocess.run(
            command,
            env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
        lines = done.stdout.splitlines()
        own = "subprocess exited with status"  # buildah's remarks on a failure
        return done.returncode, "\n".join(line for line in lines if own not in line)


def install(where: Path = WHERE) -> Store:
    """buildah, and a store: overlay where the kernel lets root mount one, else copies."""
    debian.install("buildah", "ca-certificates", "iproute2", "mmdebstrap", "util-linux")
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where) as name:
        folders = [Path(name, each) for each in ("lower", "upper", "work", "merged")]
        for each in folders:
            each.mkdir()
        options = ",".join(f"{each.name}dir={each}" for each in folders[:3])
        mount: list[str | Path] = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, folders[3]]
        works = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    driver = "overlay" if works else "vfs"
    return Store(where / f"buildah-{driver}", driver)


def base(store: Store, where: Path = WHERE) -> str:
    """This machine's Debian as an image."""
    image = f"localhost/debian:{parts.fingerprint()}"
    if not store.has(image):
        rootfs = parts.base_rootfs(where)
        with machine.step("the base system as an image"):
            scratch = store("from", "scratch")
            store("add", "--quiet", scratch, rootfs, "/")
            store("commit", "--quiet", "--rm", scratch, image)
    return image


def build(where: Path = WHERE) -> tuple[Store, str]:
    """The store, and the image of the project as it is now; an unchanged project is not built again."""
    store = install(where)
    image = f"localhost/gpt2hpc:{parts.fingerprint(*INPUTS)}"
    if store.has(image):
        return store, image
    given = parts.arguments(base(store, where))
    options = [f"--build-arg={key}={value}" for key, value in given.items()]
    options += [f"--build-context=wheels={parts.wheels(where)}", "--layers=false", "--pull-never"]
    with tempfile.TemporaryDirectory(dir=where, prefix="build-") as name, machine.step("build docker/Dockerfile"):
        context = Path(name, "context")
        context.mkdir()
        parts.copy(context, *INPUTS)
        configuration = Path(name, "pip.conf")
        configuration.write_text(f"# {SECRET}\n[global]\nextra-index-url = https://user:{SECRET}@localhost/simple\n")
        options.append(f"--secret=id=pip.conf,src={configuration}")
        store("bud", *options, "--file", context / DOCKERFILE, "--tag", image, context)
    _discard_old(store)
    return store, image


def archive(store: Store, image: str, folder: Path) -> Path:
    """The image as `docker save` writes it."""
    file = folder / "gpt2hpc.tar"
    with machine.step("image to docker-archive"):
        store("push", "--quiet", image, f"docker-archive:{file}:{image}")
    return file


def _discard_old(store: Store) -> None:
    """All of the project's images but the youngest few."""
    found = json.loads(store("images", "--json"))
    young = sorted(found, key=lambda each: each["createdatraw"], reverse=True)
    names = [name for each in young for name in each["names"] or () if name.startswith("localhost/gpt2hpc:")]
    for name in names[parts.KEPT :]:
        subprocess.run(store.command("rmi", name), capture_output=True, check=False)  # one in use stays
