"""The files that images are built by: the lock fits the project, and both build files take the same arguments to the same ends."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpt2hpc import __version__

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "docker/requirements.lock").read_text()
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
DEFINITION = (ROOT / "apptainer.def").read_text()
BASES = [
    {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    | {"os_name": "posix", "implementation_name": "cpython", "platform_machine": machine}
    for python in ("3.11", "3.12", "3.13", "3.14")
    for machine in ("x86_64", "aarch64")
]
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
"""What is installed before, from any index."""


def locked() -> dict[str, Requirement]:
    lines = [line.removesuffix(" \\") for line in LOCK.splitlines() if re.match(r"\w", line)]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


def image_extras() -> list[str]:
    named = re.search(r"(?m)^IMAGE_EXTRAS := (.*)$", (ROOT / "Makefile").read_text())
    assert named
    return named[1].split()


def needed(base: dict[str, str]) -> set[str]:
    """Everything that the image's extras need on that Python and machine, by the packages that are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    waiting = [*project["project"]["dependencies"], *(each for extra in image_extras() for each in extras[extra])]
    waiting += project["build-system"]["requires"]
    seen: set[tuple[str, str]] = set()
    found: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if OF_TORCH.fullmatch(name) and name != "torch":
            continue
        found.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += of_installed(name, {**base, "extra": extra})
    return found - {"torch"}


def of_installed(name: str, environment: dict[str, str]) -> Iterator[str]:
    try:
        declared = requires(name) or []
    except PackageNotFoundError:  # of another Python only
        return
    for each in declared:
        requirement = Requirement(each)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            yield str(requirement)


@pytest.mark.parametrize("base", BASES, ids=lambda base: f"{base['python_version']}-{base['platform_machine']}")
def test_the_lock_has_what_the_image_needs(base: dict[str, str]) -> None:
    """Installed with --no-deps: what is missing would be missing at run time."""
    there = {name for name, each in locked().items() if each.marker is None or each.marker.evaluate(base)}
    assert needed(base) <= there


def test_the_lock_has_the_versions_that_are_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    tested = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert {name: str(each.specifier) for name, each in locked().items()} == {
        name: f"=={tested[name]}" for name in locked()
    }


def test_each_line_of_the_lock_has_hashes() -> None:
    entries = re.findall(r"(?m)^\w.*(?:\n    --hash=.*)*", LOCK)
    assert len(entries) == len(locked())
    for entry in entries:
        assert re.search(r" \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry


def test_the_lock_leaves_torch_alone() -> None:
    """The base may bring its own, or its own index."""
    assert not [name for name in locked() if OF_TORCH.fullmatch(name)]


@pytest.mark.parametrize(
    "name", ["apptainer.def", *(f"docker/{each}" for each in ("Dockerfile", "install.sh", "requirements.lock"))]
)
def test_no_address_is_built_in(name: str) -> None:
    """Of a registry, an index or a mirror: each site has its own."""
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not re.search(r"(?m)^\s*(--(extra-)?index-url|--find-links|--trusted-host)", text)
    assert not re.search(r"\b[\w-]+\.(io|com|org|net)/", text)


def arguments_of_dockerfile() -> dict[str, str]:
    return dict(re.findall(r"(?m)^ARG (\w+)=(.*)$", DOCKERFILE))


def test_both_build_files_take_the_same_arguments() -> None:
    section = re.search(r"%arguments\n(.*?)\n\n", DEFINITION, re.DOTALL)
    assert section
    definition = dict(line.strip().split("=", 1) for line in section[1].splitlines())
    assert definition.pop("BOOTSTRAP") == "docker"
    assert definition == arguments_of_dockerfile()
    assert definition["VERSION"] == __version__
    makefile = re.search(r"(?m)^TORCH \?= (.*)$", (ROOT / "Makefile").read_text())
    assert makefile
    assert definition["TORCH_SPEC"] == makefile[1]


def test_each_argument_reaches_the_script() -> None:
    script = (ROOT / "docker/install.sh").read_text()
    for name in arguments_of_dockerfile().keys() - {"BASE_IMAGE", "VCS_REF"}:
        assert re.search(rf"\$\{{{name}:[-+]", script) or f"unset {name}" in script, name
        assert f"{name}='{{{{ {name} }}}}'" in DEFINITION, name


def test_both_label_alike() -> None:
    docker = dict(re.findall(r'(org\.opencontainers\.[\w.]+)="([^"]*)"', DOCKERFILE))
    apptainer = dict(re.findall(r'(?m)^ +echo "(org\.opencontainers\.[\w.]+) (.*)"$', DEFINITION))
    assert {key: re.sub(r"\$\{(\w+)\}", r"{{ \1 }}", value) for key, value in docker.items()} == apptainer
    assert {"org.opencontainers.image.version", "org.opencontainers.image.revision"} < apptainer.keys()
    assert "%labels" not in DEFINITION.replace("# Not %labels", ""), "these would yield to those of the base"


def test_the_context_is_what_is_built_in() -> None:
    """What .dockerignore lets through is what the definition file copies, and the script installs."""
    let_through = set(re.findall(r"(?m)^!(.*)$", (ROOT / ".dockerignore").read_text()))
    section = re.search(r"%files\n(.*?)\n\n", DEFINITION, re.DOTALL)
    assert section
    copied = dict(re.findall(r"(?m)^    ([\w./]+) /opt/checkout/(\S+)$", section[1]))
    assert set(copied) == set(copied.values()) == let_through
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")


def test_the_dockerfile_passes_hadolint() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        must = os.environ.get("CI") == "true" and platform.machine() == "x86_64"
        (pytest.fail if must else pytest.skip)("hadolint is not installed")
    done = subprocess.run([program, ROOT / "docker/Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
