"""The container image that jobs run in, and what is needed to run it unprivileged."""

from __future__ import annotations

import os
from pathlib import Path

from gpt2hpc import __version__
from gpt2hpc.checks.programs import ask
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import image_version, queries
from gpt2hpc.cluster.site_profile import OF_SIF
from gpt2hpc.finding import Finding, missing, ok, warn

SYS = Path("/proc/sys")
PYXIS = "--container-image"
"""Its option of srun, by which it is known."""


def look(scene: Scene) -> list[Finding]:
    if scene.is_in_image:
        return [ok("image", "this is one; the host's doctor looks at what runs it")]
    if scene.uses_pyxis:
        return [_pyxis(queries.has_option("srun", PYXIS)), *_image_of_pyxis(str(scene.image)), *_binds(scene)]
    if scene.image is not None and scene.site.runtime == "docker":
        runtime, found = _runtime(scene)
        return [*found, *(_image_of_docker(scene.image) if runtime else []), *_binds(scene)]
    runtime, found = _runtime(scene)
    if scene.image is None:
        return [*found, ok("image", "none is given, so none is needed")] if runtime else []
    if runtime:
        found += _unprivileged(runtime, scene.image)
    return [*found, *_image(scene.image, runtime), *_binds(scene)]


def _runtime(scene: Scene) -> tuple[str | None, list[Finding]]:
    """What runs images; None where it is not here."""
    names = (scene.site.runtime,) if scene.image else OF_SIF
    for name in names:
        answer = ask((name, "--version"))
        if answer is not None and answer.code == 0:
            return name, [ok(name, answer.out.strip().removeprefix(name).removeprefix(" version ").strip())]
        if answer is not None:
            return None, [missing(name, f"it is here, but fails: {answer.words}")]
    if scene.image is None:
        return None, []
    name = names[0]
    other = "singularity" if name == "apptainer" else "apptainer"
    mend = f"install it, load its module, or set `runtime: {other}` in the site profile"
    if queries.has_option("srun", PYXIS):
        mend += ", or `runtime: pyxis`, which srun has here"
    if scene.is_login_node and scene.site.setup:
        return None, [warn(name, f"not on PATH here; the profile's setup lines may load it; else {mend}")]
    return None, [missing(name, f"not on PATH, and jobs run in an image; {mend}")]


def _pyxis(known: bool) -> Finding:
    """A plugin of srun's, which needs neither FUSE nor anything on PATH here; `known` says whether srun has its option."""
    if known:
        return ok("pyxis", f"srun has its {PYXIS}")
    text = (
        f"there is no srun here that knows its {PYXIS}; ask for pyxis, or set `runtime: apptainer` in the site profile"
    )
    return missing("pyxis", text)


def _image_of_pyxis(image: str) -> list[Finding]:
    if not image.startswith("/"):
        text = f"{image} is in a registry, and not looked at; each node fetches it at each start: `enroot import` makes a file of it"
        return [warn("image", text)]
    return _image(image, None, how="enroot import")


def _image_of_docker(image: str) -> list[Finding]:
    answer = ask(("docker", "image", "inspect", image))
    if answer is None or answer.code:
        said = answer.words if answer else "no answer"
        text = f"{image} is not known here ({said}); load it on each node: `docker load --input FILE`"
        return [missing("image", text)]
    return [_of_version(image, image_version.version_in(image, "docker"), "loaded here; other nodes may lack it")]


def _unprivileged(runtime: str, image: str) -> list[Finding]:
    """User namespaces, and FUSE for an image in one file; a runtime that root has installed setuid needs neither."""
    if _is_setuid(runtime):
        return [ok("setuid", f"{runtime} mounts images as root, and needs neither user namespaces nor FUSE")]
    found = [_namespaces()]
    if Path(image).is_dir():
        return found
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        text = "/dev/fuse may not be used, so an image is unpacked: by jobs once on each node, otherwise at each start"
        return [*found, warn("FUSE", f"{text}; do it once: `{runtime} build --sandbox DIR {image}`")]
    return [*found, ok("FUSE", "/dev/fuse may be used, so images are mounted")]


def _is_setuid(runtime: str) -> bool:
    answer = ask((runtime, "buildcfg"))
    lines = answer.out.splitlines() if answer else []
    folder = next((line.partition("=")[2] for line in lines if line.startswith("LIBEXECDIR=")), None)
    starter = Path(folder or "/nowhere") / runtime / "bin" / "starter-suid"
    return starter.exists() and bool(starter.stat().st_mode & 0o4000)


def _namespaces() -> Finding:
    name, answer = "user namespaces", ask(("unshare", "--user", "--map-root-user", "true"))
    if answer is not None and answer.code == 0:
        return ok(name, "may be made")
    reasons = {
        SYS / "user/max_user_namespaces": "0",
        SYS / "kernel/unprivileged_userns_clone": "0",
        SYS / "kernel/apparmor_restrict_unprivileged_userns": "1",
    }
    for path, bad in reasons.items():
        if path.exists() and path.read_text().strip() == bad:
            return missing(
                name, f"{path} is {bad}: ask for another value, or for a setuid Apptainer; or install without an image"
            )
    if answer is None:
        return warn(name, "not known: there is no `unshare` to try")
    return missing(name, f"may not be made here ({answer.words}); ask for them, or for a setuid Apptainer")


def _image(image: str, runtime: str | None, *, how: str = "gpt2hpc image build") -> list[Finding]:
    path = Path(image)
    if not path.exists():
        return [
            missing(
                "image",
                f"{image} does not exist; make it ({how}), or give another",
            )
        ]
    if not os.access(path, os.R_OK):
        return [missing("image", f"{image} may not be read; have it opened to you")]
    if set(image) & set(",:"):
        return [
            missing("image", f"{image} has a comma or a colon, which a container's --bind cannot; choose another path")
        ]
    size = "a directory" if path.is_dir() else f"{path.stat().st_size / 1e9:,.2f} GB"
    return [_of_version(image, image_version.version_in(image, runtime) if runtime else None, size)]


def _of_version(image: str, labelled: str | None, words: str) -> Finding:
    if labelled is None:
        return ok("image", f"{image}, {words}")
    if labelled != __version__:
        return missing("image", image_version.mismatch(image, labelled))
    return ok("image", f"{image}, {words}, gpt2hpc {labelled} as here")


def _binds(scene: Scene) -> list[Finding]:
    lacking = [bind for bind in scene.site.binds if not Path(bind.partition(":")[0]).exists()]
    if not lacking:
        return []
    text = f"{', '.join(lacking)} not here, and a container does not start without; mend `binds` in the site profile"
    return [(warn if scene.is_login_node else missing)("binds", text)]
