"""How an image is built: from which source, with which arguments, where. Nothing here starts anything but git."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt2hpc import __version__
from gpt2hpc.cluster import file_system, image_file
from gpt2hpc.errors import ConfigError, MissingError, UsageError

DEFINITION = "apptainer.def"
ARCHIVE = "docker-archive:"
BOOTSTRAPS = ("docker-archive", "docker-daemon", "library", "localimage", "oci", "oci-archive", "oras")
OF_FILES = ("docker-archive", "localimage", "oci", "oci-archive")
CUDA_BYTES, CPU_BYTES = 20e9, 5e9
"""What a build needs beside the image, about: torch with CUDA's libraries unpacked, or without, and both again while pip unpacks."""
SLOW = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "panfs", "wekafs")
"""File systems that are shared: tens of thousands of small files take long there, and owners of files may not be kept."""


@dataclass(frozen=True)
class Source:
    """What the image is made of.

    Args:
        path: A definition file, or a docker archive.
        is_archive: Which of the two.
        defaults: The definition file's arguments; empty of an archive.
        base: The argument that the definition file's header takes the base image from, and the one for its kind, if it has them.
    """

    path: Path
    is_archive: bool = False
    defaults: Mapping[str, str] = field(default_factory=dict)
    base: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class Build:
    """All that decides what is built; `scratch` is where it is unpacked, `options` go to the runtime as they are."""

    runtime: str
    source: Source
    out: Path
    scratch: Path
    arguments: Mapping[str, str]
    options: tuple[str, ...] = ()

    def command(self, target: Path) -> list[str]:
        """To be run in the source's directory, which a definition file's paths start from."""
        given = [word for name, value in self.arguments.items() for word in ("--build-arg", f"{name}={value}")]
        what = f"{ARCHIVE}{self.source.path}" if self.source.is_archive else self.source.path.name
        return [self.runtime, "build", *given, *self.options, str(target), what]

    def environment(self) -> dict[str, str]:
        return {f"{self.runtime.upper()}_TMPDIR": str(self.scratch)}


def find_source(named: str | None, *, here: Path, package: Path) -> Source:
    """What is named, else the definition file of the checkout that this is, or that gpt2hpc runs from."""
    if named and named.startswith(ARCHIVE):
        path = _there(Path(named.removeprefix(ARCHIVE).removeprefix("//")), here)
        if image_file.archive(path) is None:
            raise ConfigError(
                f"--from={named} is no docker archive of one image; make one with `docker save IMAGE -o FILE`"
            )
        return Source(path, is_archive=True)
    if named:
        return read_definition(_there(Path(named), here))
    for folder in (here, package.parent):
        if (folder / DEFINITION).is_file():
            return read_definition(folder / DEFINITION)
    raise MissingError(
        f"no {DEFINITION} in {here}, nor beside the package {package}: a checkout of gpt2hpc has it, what pip installs does not; run "
        f"this in a checkout of version {__version__}, or give --from CHECKOUT/{DEFINITION}, or --from {ARCHIVE}FILE"
    )


def _there(path: Path, here: Path) -> Path:
    path = here / path.expanduser()
    if not path.is_file():
        raise ConfigError(f"--from={path} is not a file; name a definition file, or {ARCHIVE}FILE")
    return path


def read_definition(path: Path) -> Source:
    """Raises ConfigError for what is none, and for that of a checkout whose version is another than ours."""
    text = path.read_bytes().decode(errors="replace")
    if not re.search(r"(?im)^\s*bootstrap:", text):
        hint = f"; is it an archive? --from {ARCHIVE}{path}" if image_file.archive(path) else ""
        raise ConfigError(f"--from={path} is no definition file: it has no line `Bootstrap:`{hint}")
    theirs = version_beside(path)
    if theirs not in (None, __version__):
        raise ConfigError(
            f"{path} is of gpt2hpc {theirs}, and here it is {__version__}, which writes what the image reads: use that checkout's own "
            "gpt2hpc (pip install .), or a checkout of this version"
        )
    return Source(path, defaults=arguments_in(text), base=(_placeholder(text, "from"), _placeholder(text, "bootstrap")))


def version_beside(definition: Path) -> str | None:
    """Of the gpt2hpc in the same checkout; None where there is none."""
    init = definition.parent / "gpt2hpc" / "__init__.py"
    found = re.search(r'(?m)^__version__ = "(.+)"', init.read_text(encoding="utf-8")) if init.is_file() else None
    return found[1] if found else None


def arguments_in(definition: str) -> dict[str, str]:
    """Names and defaults of its section `%arguments`; an argument that is not there is an error to the runtime."""
    section = re.search(r"(?ms)^%arguments\b[^\n]*\n(.*?)(?=^%|\Z)", definition)
    return dict(re.findall(r"(?m)^\s*([A-Za-z_]\w*)=(.*?)\s*$", section[1])) if section else {}


def _placeholder(definition: str, key: str) -> str | None:
    found = re.search(rf"(?im)^\s*{key}:\s*\{{\{{\s*(\w+)\s*\}}\}}", definition)
    return found[1] if found else None


def settled_arguments(
    source: Source, *, torch: str | None, index_url: str | None, base: str | None, pairs: Sequence[str], here: Path
) -> dict[str, str]:
    """What is given to the definition file, by name; UsageError for an argument that it does not take."""
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--build-arg={pair} must be NAME=VALUE")
        given[name] = value
    if torch is not None:
        given["TORCH_SPEC"] = torch
    if index_url is not None:
        given["TORCH_INDEX_URL"] = index_url
    if base is not None:
        given.update(_base(source, base, here))
    _check_arguments(source, given)
    known = {"VERSION": version_beside(source.path), "VCS_REF": _commit(source.path.parent)}
    ours = {name: value for name, value in known.items() if value and name in source.defaults}
    return {**ours, **given}


def refuse_credentials(name: str, value: str) -> None:
    """Raise UsageError, without the value, for an address with a password: it would be in lists of processes and in the image."""
    if re.search(r"://[^/@\s]+@", value):
        raise UsageError(
            f"{name} has credentials in an address, and would be kept in the image; mount a pip.conf that has them, as "
            "docs/containers.md says: gpt2hpc image build -- --bind $HOME/.config/pip/pip.conf:/etc/pip.conf"
        )


def _check_arguments(source: Source, given: Mapping[str, str]) -> None:
    for name, value in given.items():
        refuse_credentials(name, value)
        if source.is_archive:
            raise UsageError(f"{name}={value} is for a definition file: an archive is taken as it is; drop it")
        if name not in source.defaults:
            known = ", ".join(source.defaults) or "none"
            raise UsageError(f"{source.path} takes no argument {name}; it has {known}")
        if set(value) & set("'\n"):
            raise UsageError(
                f"{name}={value} has a quote or a line break, which a definition file cannot take; write it without"
            )


def _base(source: Source, base: str, here: Path) -> dict[str, str]:
    """`NAME:TAG` and `docker://NAME` are of a registry; `localimage:PATH` and others are as a definition file has them."""
    kind, _, rest = base.partition(":")
    kind, where = (kind, rest.removeprefix("//")) if kind in BOOTSTRAPS else ("docker", base.removeprefix("docker://"))
    if kind in OF_FILES:
        where = str(here / Path(where).expanduser())
        if not Path(where).exists():
            raise ConfigError(f"--base={base}: {where} does not exist; name an image that does")
    image, bootstrap = source.base
    if image is None or (bootstrap is None and kind != "docker"):
        raise UsageError(f"--base={base}, but the header of {source.path} leaves no choice of it; drop --base")
    return {image: where, **({bootstrap: kind} if bootstrap else {})}


def _commit(folder: Path) -> str | None:
    """Of the checkout, with `-dirty` where files differ; None where there is no git, or it is none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def scratch_dir(option: str | None, runtime: str, env: Mapping[str, str]) -> Path:
    """Where the runtime unpacks: as it would choose, unless told. ConfigError where that cannot be written to."""
    named = option or env.get(f"{runtime.upper()}_TMPDIR") or env.get("TMPDIR") or "/tmp"
    path = Path(named).expanduser().absolute()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"the build cannot write to {path}; make it, or choose another with --tmp-dir")
    return path


def warnings(build: Build) -> list[str]:
    """What may go wrong with the places that the build writes to."""
    found, needed = [], needed_bytes(build)
    free = shutil.disk_usage(build.scratch).free
    if needed is not None and free < needed:
        text = f"{build.scratch} has {free / 1e9:,.1f} GB free, and the build takes about {needed / 1e9:,.0f} GB there"
        found.append(f"{text}; choose a larger place with --tmp-dir, or {build.runtime.upper()}_TMPDIR")
    mount = file_system.of(build.scratch)
    if mount is not None:
        if mount.kind in SLOW:
            text = f"{build.scratch} is on {mount.kind}: slow for many small files, and it may refuse their owners"
            found.append(f"{text}; choose this machine's own disk with --tmp-dir, such as /tmp or /var/tmp")
        if "noexec" in mount.options.split(","):
            text = f"{build.scratch} is mounted noexec, and the build runs programs there"
            found.append(f"{text}; choose another place with --tmp-dir")
        if mount.kind in ("tmpfs", "ramfs"):
            found.append(
                f"{build.scratch} is memory ({mount.kind}), which the build fills; choose a disk with --tmp-dir"
            )
    return found


def needed_bytes(build: Build) -> float | None:
    """In the scratch directory, about; None where nothing is known of what is built."""
    if build.source.is_archive:
        return 3.0 * build.source.path.stat().st_size
    if "TORCH_SPEC" not in build.source.defaults:
        return None
    words = " ".join((build.arguments.get("TORCH_SPEC", ""), build.arguments.get("TORCH_INDEX_URL", "")))
    return CPU_BYTES if re.search(r"[+/]cpu\b", words) else CUDA_BYTES
