"""Where compilers keep what they have compiled: one directory a user and node, which a restart and later jobs find warm.

It is on the node's own disk, since caches break where several nodes write them. What lies in it is run, so it must be the
user's alone: another user of the node could have made a directory of that name first.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from gpt2hpc import cli
from gpt2hpc.cluster import file_system
from gpt2hpc.cluster.dist_env import DistEnv

PLACE = "GPT2HPC_CACHE_DIR"
"""Of the user or the site: the directory in which it is made."""
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
"""The variables by which compilers are told, and what each gets. One that is set already is left as it is."""
MODEL = Path(__file__).parents[1] / "model"
UNUSED_DAYS = 30
"""After which what another torch has compiled goes."""


class UnfitError(Exception):
    """Why a directory is not to be trusted."""


def settle(environ: MutableMapping[str, str], env: DistEnv) -> Path | None:
    """Name the directories in `environ`, before torch is imported; returns where they are, None where all are named already.

    Where the user's own directory cannot be trusted each process gets a fresh one, which goes with it; the first of a node says so.
    """
    unnamed = [name for name in FOLDERS if not environ.get(name)]
    if not unnamed:
        return None
    speaks = env.local_rank == 0
    try:
        folder = _kept(_place(environ), env, tidies=speaks)
    except (UnfitError, OSError) as why:
        try:
            folder = Path(tempfile.mkdtemp(prefix="gpt2hpc-compiled-"))
        except OSError:
            return None  # nothing can be written: the compilers will say it better
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        if speaks:
            cli.warn(f"{why}: what is compiled is kept in {folder}, for this start alone; {PLACE} names another place")
    for name in unnamed:
        environ[name] = str(folder / FOLDERS[name])
    return folder


def _kept(place: Path, env: DistEnv, *, tidies: bool) -> Path:
    """The user's own directory in `place`, for this Python, torch and C library; made where it is missing."""
    own = place / f"gpt2hpc-{os.getuid()}-compiled"
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700, parents=True)
    refuse_unless_private(own)
    mount = file_system.of(own)
    if mount is not None and not mount.is_local:  # chosen by name; then at least no two nodes share one
        own = own / (env.node or "node")
    folder = own / _software()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(folder)
    if tidies:
        _tidy(own, folder)
    return folder


def refuse_unless_private(path: Path) -> None:
    """Raise UnfitError unless `path` is a directory of this user's that nobody else can write into, or put another in place of."""
    facts, above = path.lstat(), path.parent.stat()
    if not stat.S_ISDIR(facts.st_mode):
        raise UnfitError(f"{path} is no directory")
    if facts.st_uid != os.getuid():
        raise UnfitError(f"{path} belongs to another user (uid {facts.st_uid})")
    if facts.st_mode & 0o022:
        raise UnfitError(f"{path} may be written by others (mode {stat.S_IMODE(facts.st_mode):o})")
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise UnfitError(f"{path.parent} lets every user rename what is in it (mode {stat.S_IMODE(above.st_mode):o})")
    path.chmod(0o700)


def _place(environ: Mapping[str, str]) -> Path:
    """PLACE; else the first of TMPDIR, /tmp and /var/tmp that outlives the job; where none does, the first that can be used."""
    if named := environ.get(PLACE):
        return Path(named).absolute()
    job = environ.get("SLURM_JOB_ID", "")
    named_places = [Path(name) for name in (environ.get("TMPDIR"), "/tmp", "/var/tmp") if name]
    usable = [place for place in named_places if _is_usable(place)]
    mine = Path(environ.get("SLURM_TMPDIR") or "/nowhere")
    lasting = [place for place in usable if outlives(place, job) and not place.is_relative_to(mine)]
    return next(iter([*lasting, *usable]), Path("/tmp"))


def _is_usable(place: Path) -> bool:
    """Whether programs can be written there and run from there, on a disk of this node."""
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        return False
    mount = file_system.of(place)
    noexec = getattr(os, "ST_NOEXEC", 0)  # Linux's
    return not os.statvfs(place).f_flag & noexec and (mount is None or mount.is_local)


def outlives(place: Path, job: str) -> bool:
    """Whether neither its name nor what is mounted there is the job's own: Slurm's job_container/tmpfs mounts BASE/JOB/.JOB on /tmp."""
    mount = file_system.of(place)
    names = [os.path.realpath(place), mount.root if mount else ""]
    return not job or not any(re.search(rf"(?<!\d){re.escape(job)}(?!\d)", name) for name in names)


def _software() -> str:
    """What compiled code depends on beside the compilers' own keys: an image has other libraries than its host, and of our operators,
    in whichever of the model's files, the compiler knows no more than the names, and has their gradients compiled in."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "unknown"
    library = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    operators = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(MODEL.glob("*.py")))).hexdigest()[:8]
    return f"{sys.implementation.cache_tag}-torch-{torch}-{library or sys.platform}-{operators}".replace(" ", "-")


def _tidy(own: Path, used: Path) -> None:
    """Remove what was compiled for others than this torch, and has not been used for long."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for folder in own.iterdir():
        with contextlib.suppress(OSError):
            if folder != used and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
