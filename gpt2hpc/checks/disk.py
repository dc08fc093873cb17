"""Disks: room for the run and its checkpoints, what kind of file system it is, and the node's own."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from gpt2hpc.checks.programs import ask
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import file_system
from gpt2hpc.errors import DataError, RunDirError
from gpt2hpc.finding import Finding, missing, ok, warn
from gpt2hpc.training import checkpoint

FILES_EACH = 100
"""Of a checkpoint, generously: two a rank and three more."""
SMALL_SHM_BYTES = 512 << 20
SMALL_SCRATCH_BYTES = 1 << 30


def look(scene: Scene) -> list[Finding]:
    place = existing(scene.run.path)
    return [
        *_run_dir(scene, place),
        *_file_system(scene, place),
        *_quota(scene, place),
        _scratch(scene),
        *_shard_cache(scene),
        *_shared_memory(),
    ]


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _run_dir(scene: Scene, place: Path) -> list[Finding]:
    """May it be written, and is there room for what will be kept?"""
    name = "run directory"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        mend = "choose another with --run-dir, or free space"
        return [missing(name, f"{scene.run.path} cannot be written ({error.strerror}); {mend}")]
    found = [ok(name, f"{scene.run.path} can be written")]
    kept, each = scene.config.checkpoint.keep_last, scene.checkpoint_bytes
    there = scene.run.checkpoints if scene.run.checkpoints.is_dir() else place
    resumed = checkpoint.furthest(there)
    try:
        begins = scene.config.decay_begins
        checkpoint.check_space(
            there, bytes_each=each, config=scene.config.checkpoint, resumed=resumed, decay_begins=begins
        )
    except RunDirError as error:
        found.append(missing("space", error.line))
    else:
        facts = os.statvfs(place)
        free = facts.f_bavail * facts.f_frsize
        count = kept + 1 + (resumed is not None)
        text = f"{free / 1e9:,.0f} GB free; {count} checkpoints of {scene.config.model.tag} take {count * each / 1e9:,.1f} GB"
        found.append(ok("space", text))
    facts = os.statvfs(place)
    needed = (kept + 1) * FILES_EACH
    if facts.f_files and facts.f_favail < needed:  # no number where the file system has no limit
        text = f"{facts.f_favail:,} can be made here, and checkpoints need up to {needed:,}; delete some, or choose another --run-dir"
        found.append(missing("files", text))
    return found


def _file_system(scene: Scene, place: Path) -> list[Finding]:
    name, mount = "file system", file_system.of(place)
    if mount is None:
        return []
    kind, what = mount.kind, f"{place} is on {mount.kind} ({mount.where})"
    if kind in ("tmpfs", "ramfs"):
        return [warn(name, f"{what}: memory, gone with the node and the job; choose another --run-dir")]
    if kind == "overlay":
        return [warn(name, f"{what}: a container's own layer, gone with it; bind a directory of the host's")]
    if mount.is_local and (scene.has_slurm or scene.is_in_job):
        text = f"{what}, which may be this machine's own: a job needs a run directory that all its nodes see, unless they are this one"
        return [warn(name, text)]
    hints = {
        "lustre": "; keep data.shuffle_shards low, and --data.stage true copies shards to the node's disk",
        "gpfs": "; --data.stage true copies shards to the node's disk",
        "nfs": "; --data.stage true copies shards to the node's disk, and an image belongs on it too",
    }
    return [ok(name, what + next((hint for word, hint in hints.items() if kind.startswith(word)), ""))]


def _quota(scene: Scene, place: Path) -> list[Finding]:
    """What `lfs quota` or `quota` says, where one of them says anything."""
    mount = file_system.of(place)
    user = scene.env.get("USER", str(os.getuid()))
    needed = (scene.config.checkpoint.keep_last + 1) * scene.checkpoint_bytes
    if mount and mount.kind == "lustre":
        answer = ask(("lfs", "quota", "-q", "-u", user, str(place)))
    else:
        answer = ask(("quota", "-w", "-p", "-v", "--show-mntpoint", "--hide-device"))
    if answer is None or answer.code is None or mount is None:
        return []
    left = blocks_left(answer.out, mount.where if mount.kind != "lustre" else None)
    if left is None:
        return []
    if left < needed:
        text = f"{max(0, left) / 1e9:,.1f} GB left, checkpoints need {needed / 1e9:,.1f} GB; delete some, or choose another --run-dir"
        return [missing("quota", text)]
    return [ok("quota", f"{left / 1e9:,.0f} GB left here")]


def blocks_left(said: str, where: str | None) -> int | None:
    """Bytes below the lower of a quota's two limits, from rows `NAME used soft hard …` in KiB; None where there is no limit.

    The row of the mount point `where`, or the first one with numbers.
    """
    for line in said.splitlines():
        match = re.match(r"\s*(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\b", line)
        if match and where in (None, match[1]):
            used, *limits = (int(number) for number in match.groups()[1:])
            limits = [limit for limit in limits if limit]
            return (min(limits) - used) * 1024 if limits else None
    return None


def _scratch(scene: Scene) -> Finding:
    """The node's own disk: compilers' caches."""
    name = next((name for name in ("SLURM_TMPDIR", "TMPDIR") if scene.env.get(name)), None)
    place = Path(scene.env[name] if name else "/tmp")
    what = f"{place} (${name})" if name else str(place)
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return missing("scratch", f"{what} is no directory that can be written; unset {name}, or make it")
    facts, mount = os.statvfs(place), file_system.of(place)
    free = facts.f_bavail * facts.f_frsize
    if mount and "noexec" in mount.options.split(","):
        text = f"{what} is mounted noexec, and torch.compile loads programs from there; set TMPDIR to another directory on the node"
        return warn("scratch", text)
    if mount and mount.kind.startswith(("nfs", "lustre", "gpfs", "beegfs")):
        text = f"{what} is on {mount.kind}, which nodes share: compilers' caches break there; set TMPDIR to the node's own disk"
        return warn("scratch", text)
    if free < SMALL_SCRATCH_BYTES:
        text = f"{what} has {free / 1e9:,.1f} GB free, and {SMALL_SCRATCH_BYTES / 1e9:,.1f} GB may be needed; free space, or set TMPDIR"
        return warn("scratch", text)
    kind = f", {mount.kind}" if mount else ""
    return ok("scratch", f"{what}{kind}, {free / 1e9:,.0f} GB free")


def _shard_cache(scene: Scene) -> list[Finding]:
    """Where a node keeps shards, with --data.stage or from the Hub; a login node may lack what nodes that compute have."""
    from gpt2hpc.data import store

    if not _is_staged(scene):
        return []
    name, data = "shard cache", scene.config.data
    lacking = warn if scene.is_login_node else missing
    try:
        directory = store.cache_directory(data.cache_dir, scene.env)
    except DataError as error:
        return [lacking(name, error.line)]
    place = existing(directory)
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return [lacking(name, f"data.cache_dir={directory} cannot be made below {place}; choose another")]
    facts, needed = os.statvfs(place), data.cache_gib * 2**30
    free = facts.f_bavail * facts.f_frsize
    if free < needed:
        text = f"{directory} has {free / 1e9:,.1f} GB free, and data.cache_gib={data.cache_gib:g} are {needed / 1e9:,.1f} GB"
        return [warn(name, f"{text}; lower that, or choose another --data.cache_dir")]
    return [ok(name, f"{directory}, {free / 1e9:,.0f} GB free")]


def _is_staged(scene: Scene) -> bool:
    return scene.config.data.stage or (scene.data or scene.config.data.dir).startswith("hf://")


def _shared_memory() -> list[Finding]:
    """NCCL's ranks on a node meet in /dev/shm."""
    try:
        facts = os.statvfs("/dev/shm")
    except OSError:
        return [warn("/dev/shm", "is not there, and NCCL shares memory by it; in docker, run with --ipc=host")]
    free = facts.f_bavail * facts.f_frsize
    if free < SMALL_SHM_BYTES:
        text = f"has {free >> 20} MiB free, which is little for NCCL; in docker, run with --ipc=host"
        return [warn("/dev/shm", text)]
    return [ok("/dev/shm", f"{free / 1e9:,.1f} GB free")]
