"""Checkpoints on disk: a directory that is complete or absent.

    20260131-120000_gpt2-124m-ctx1024_step0001000/
        state-00000-of-00004.safetensors    full tensors by name, spread over the ranks that wrote them
        rank-00000.safetensors              what belongs to one rank: its random number generators
        manifest.json                       step, config, data position, versions; size and sha256 of every file, its own too

All of it is written to a directory `….tmp`, fsynced, read back, compared and renamed. A reader needs no particular number of files.
Nothing is pickled, so nothing that is loaded can run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gpt2hpc import durable
from gpt2hpc.errors import RunDirError, as_users
from gpt2hpc.training.process_group import Ranks

FORMAT = 1
MANIFEST = "manifest.json"

_NAME = re.compile(r"(?P<started>\d{8}-\d{6})_(?P<tag>[\w.-]+)_step(?P<step>\d{7,})$")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A directory that claims to be a checkpoint."""

    path: Path

    @property
    def step(self) -> int:
        match = _NAME.match(self.path.name)
        return int(match["step"]) if match else -1

    def manifest(self) -> dict[str, Any]:
        """What was written of it; empty where that is missing or not what was written."""
        facts = durable.read_json(self.path / MANIFEST)
        return facts if isinstance(facts, dict) and facts.get("sha256") == _facts_sha256(facts) else {}

    def damage(self) -> str | None:
        """What is wrong with it, or None if every file has the size and sha256 that the manifest says."""
        facts = self.manifest()
        if not facts.get("files"):
            return f"{MANIFEST} is missing or damaged"
        if facts.get("format") != FORMAT:
            return f"format {facts.get('format')}, this version reads {FORMAT}"
        for name, expected in facts["files"].items():
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if file_sha256(path) != expected["sha256"]:
                return f"{name} has another sha256 than the manifest says"
        return None

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """State tensors by name, those whose name begins with `prefix`, one at a time."""
        for path in sorted(self.path.glob("state-*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys() if name.startswith(prefix))  # noqa: SIM118

    def rank_state(self, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and texts of one rank."""
        with safetensors.safe_open(self.path / f"rank-{rank:05d}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["texts"])


def name(*, started: str, tag: str, step: int) -> str:
    """`20260131-120000_gpt2-124m-ctx1024_step0001000`."""
    return f"{started}_{tag}_step{step:07d}"


def found(directory: Path) -> list[Checkpoint]:
    """What is named as a checkpoint, the furthest step first; whether it is whole is not asked."""
    if not directory.is_dir():
        return []
    named = (Checkpoint(path) for path in directory.iterdir() if _NAME.match(path.name))
    return sorted(named, key=lambda checkpoint: (checkpoint.step, checkpoint.path.name), reverse=True)


def newest_valid(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The furthest checkpoint that verifies; a damaged one is skipped aloud."""
    for checkpoint in found(directory):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        say(f"skipping the damaged checkpoint {checkpoint.path}: {damage}")
    return None


def save(
    target: Path,
    *,
    ranks: Ranks,
    state: Tensors,
    rank_state: tuple[Tensors, Mapping[str, str]],
    facts: Mapping[str, Any],
    attempt: int,
    fence: Callable[[], None],
) -> None:
    """Write and publish a checkpoint; every rank calls it with the same `state`, of which each writes a share.

    `attempt` keeps a zombie's files apart; `fence` runs on rank 0 right before publishing, and raises if this attempt
    may not. Raises RunDirError where the disk is full or read-only; what was there before stays.
    """
    temporary = target.with_name(f"{target.name}.{attempt:04d}.tmp")
    with ranks.first_decides(), _disk_errors(target):
        if ranks.is_first:
            fence()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    files = _write_together(temporary, target, ranks, state, rank_state)
    with ranks.first_decides(), _disk_errors(target):
        if ranks.is_first:
            written_facts = {"format": FORMAT, **facts, "files": files}
            durable.publish_json(temporary / MANIFEST, {**written_facts, "sha256": _facts_sha256(written_facts)})
            fence()
            if target.exists():  # damaged, or it would not be written again
                shutil.rmtree(target)
            temporary.rename(target)
            durable.fsync_dir(target.parent)


def prune(directory: Path, *, saved_step: int, keep_last: int, keep: Path | None) -> None:
    """Delete all but the last `keep_last` up to the one just saved, and the one at `keep`.

    Those ahead of it are damaged ones that were skipped; they do not count. A half-deleted one has another name.
    """
    saved = [checkpoint for checkpoint in found(directory) if checkpoint.step <= saved_step]
    for checkpoint in saved[keep_last:]:
        if checkpoint.path != keep:
            discarded = checkpoint.path.with_name(f"{checkpoint.path.name}.tmp")
            checkpoint.path.rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """Clear away what a killed save left; only for the attempt that owns the run."""
    for path in directory.glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _facts_sha256(facts: Mapping[str, Any]) -> str:
    """Of the manifest itself, but for this hash."""
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_together(
    temporary: Path, target: Path, ranks: Ranks, state: Tensors, rank_state: tuple[Tensors, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Every rank writes its share; an error of one is the error of all. Returns the files of all ranks."""
    written: dict[str, dict[str, Any]] = {}
    caught: RunDirError | OSError | None = None
    try:
        with _disk_errors(target):
            written = _write_share(temporary, ranks, state, rank_state)
    except (RunDirError, OSError) as error:
        caught = error
    results = ranks.gather((written, str(caught) if caught else None, isinstance(caught, RunDirError)))
    for _, message, is_users in results:
        if message:
            raise (RunDirError if is_users else OSError)(message) from caught
    return {name: entry for part, _, _ in results for name, entry in part.items()}


def _write_share(
    directory: Path, ranks: Ranks, state: Tensors, rank_state: tuple[Tensors, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Write this rank's files; returns the size and sha256 of each."""
    owners = _owners(state, ranks.world_size)
    share = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if owners[name] == ranks.rank}
    paths = {
        directory / f"state-{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors": (share, None),
        # one key only: safetensors writes several in random order, and equal states should be equal bytes
        directory / f"rank-{ranks.rank:05d}.safetensors": (
            dict(rank_state[0]),
            {"texts": json.dumps(dict(rank_state[1]), sort_keys=True)},
        ),
    }
    written = {}
    for path, (tensors, texts) in paths.items():
        contents = safetensors.torch.save(tensors, metadata=texts)
        digest = hashlib.sha256(contents).hexdigest()
        durable.write_bytes(path, contents)
        if file_sha256(path) != digest:
            raise OSError(f"{path.name} reads back differently than it was written")
        written[path.name] = {"bytes": len(contents), "sha256": digest}
    return written


def _owners(state: Tensors, world_size: int) -> dict[str, int]:
    """Which rank writes a tensor: the largest first, each to the rank with the least so far."""
    load = [0] * world_size
    owners = {}
    for key in sorted(state, key=lambda key: (-state[key].nbytes, key)):
        owners[key] = load.index(min(load))
        load[owners[key]] += state[key].nbytes
    return owners


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error of the user's; any other one may pass, so it stays a crash."""
    try:
        yield
    except OSError as error:
        raise RunDirError(f"checkpoint {target} could not be written: {as_users(error)}") from error
