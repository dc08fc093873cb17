"""Checkpoints on disk: a directory that is complete or absent.

    20260131-120000_gpt2-124m-ctx1024_step0001000/
        state-00000-of-00004.safetensors    full tensors by name, spread over the ranks that wrote them
        rank-00000.safetensors              what belongs to one rank: its random number generators
        metrics.jsonl                       what was logged up to this step, to go on with the curves on an empty disk
        manifest.json                       step, config, data position, versions; size and sha256 of every file, its own too

`saver` writes them. A reader needs no particular number of files. Nothing is pickled, so nothing that is loaded can run.
No torch is needed but for the tensors themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2hpc import durable
from gpt2hpc.config import CheckpointConfig
from gpt2hpc.errors import RunDirError
from gpt2hpc.run_dir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
ASSUMED_BYTES_PER_S = 300e6
"""At which one is written, until that is measured."""

_NAME = re.compile(r"(?P<started>\d{8}-\d{6})_(?P<tag>[\w.-]+)_step(?P<step>\d{7,})$")
_FILE = re.compile(r"(state-\d{5}-of-\d{5}|rank-\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A directory that claims to be a checkpoint."""

    path: Path

    @property
    def step(self) -> int:
        match = _NAME.match(self.path.name)
        return int(match["step"]) if match else -1

    @property
    def started(self) -> str:
        """When its run began, as `20260131-120000`: what the checkpoints of one run have in common."""
        match = _NAME.match(self.path.name)
        return match["started"] if match else ""

    def manifest(self) -> dict[str, Any]:
        """What was written of it; empty where that is missing or not what was written."""
        try:
            facts = durable.read_json(self.path / MANIFEST)
        except OSError:  # what a failing disk does not give is damaged, as any other file of it
            return {}
        if not isinstance(facts, dict) or not _is_sound(facts) or self.step not in (-1, facts["step"]):
            return {}
        return facts if facts["sha256"] == facts_sha256(facts) else {}

    def damage(self) -> str | None:
        """What is wrong with it, or None if every file has the size and sha256 that the manifest says."""
        facts = self.manifest()
        if not facts.get("files"):
            return f"{MANIFEST} is missing or damaged"
        if facts.get("format") != FORMAT:
            return f"format {facts.get('format')}, this version reads {FORMAT}"
        for name, expected in facts["files"].items():
            path = self.path / name
            try:
                size = path.stat().st_size
                if size != expected["bytes"]:
                    return f"{name} has {size} bytes instead of {expected['bytes']}"
                if file_sha256(path) != expected["sha256"]:
                    return f"{name} has another sha256 than the manifest says"
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        return None

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """State tensors by name, those whose name begins with `prefix`, one at a time, of the files that the manifest names."""
        import safetensors

        for name in sorted(name for name in self.manifest()["files"] if name.startswith("state-")):
            with safetensors.safe_open(self.path / name, framework="pt") as file:
                yield from ((key, file.get_tensor(key)) for key in file.keys() if key.startswith(prefix))  # noqa: SIM118

    def rank_state(self, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and texts of one rank."""
        import safetensors

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


def furthest(directory: Path) -> Checkpoint | None:
    """Which a start will resume from, unless it is damaged."""
    return next(iter(found(directory)), None)


def newest_valid(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The furthest checkpoint that verifies; a damaged one is skipped aloud."""
    for checkpoint in found(directory):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        say(f"skipping the damaged checkpoint {checkpoint.path}: {damage}")
    return None


def at(path: Path, say: Callable[[str], None], *, step: int | None = None) -> Checkpoint:
    """The checkpoint at `path`; or, of the run there, that of a step or the newest whole one. RunDirError where there is none."""
    given = Checkpoint(path.resolve())
    if given.step >= 0:
        if step not in (None, given.step):
            raise RunDirError(f"--step={step} is not that of {path}; leave it out, or name the run")
        return _whole(given)
    run = RunDir(path)
    directory = run.checkpoints if run.checkpoints.is_dir() else path
    there = found(directory)
    if step is not None:
        of_step = [each for each in there if each.step == step]
        if not of_step:
            steps = ", ".join(str(each.step) for each in there) or "none"
            raise RunDirError(f"{path} holds no checkpoint of --step={step}; it holds {steps}")
        return _whole(of_step[0])
    newest = newest_valid(directory, say)
    if newest is None:
        word = "no whole checkpoint" if there else "no checkpoint"
        raise RunDirError(f"{path} holds {word}; give a run that has saved one, or a checkpoint's directory")
    return newest


def _whole(given: Checkpoint) -> Checkpoint:
    if damage := given.damage():
        raise RunDirError(f"{given.path} is damaged: {damage}; choose another checkpoint")
    return given


def check_space(
    directory: Path,
    *,
    bytes_each: int,
    config: CheckpointConfig,
    resumed: Checkpoint | None = None,
    decay_begins: int | None = None,
) -> None:
    """Raise RunDirError if the disk has no room for the last checkpoints, the one being written, the one `resumed` from, if it is
    there, and the one of the step at which the decay begins, which stays, if it is still to come. Those of `keep_every_steps`, which
    somebody may take away meanwhile, are not counted."""
    every, saved = config.keep_every_steps, found(directory)
    replaced = [each for each in saved if each.step != decay_begins and (every is None or each.step % every)]
    there = sum(path.stat().st_size for checkpoint in replaced for path in checkpoint.path.iterdir() if path.is_file())
    beside = resumed in replaced
    decays = decay_begins is not None and all(each.step < decay_begins for each in saved)
    needed = (config.keep_last + 1 + beside + decays) * bytes_each - there
    free = shutil.disk_usage(directory).free
    if free < needed:
        counted = [f"checkpoint.keep_last={config.keep_last}", "one being written"]
        counted += ["the one resumed from"] * beside + ["the one from before the decay"] * decays
        raise RunDirError(
            f"{directory} has {free / 1e9:,.1f} GB free, but checkpoints of {bytes_each / 1e9:,.1f} GB each need another "
            f"{needed / 1e9:,.1f} GB ({', '.join(counted[:-1])} and {counted[-1]}); free space, lower "
            "--checkpoint.keep_last, or choose another --run-dir"
        )


def outdated(saved: Collection[int], config: CheckpointConfig) -> set[int]:
    """Those of the `saved` steps that need not be kept: not among the last, nor one of every so many."""
    older, every = sorted(saved, reverse=True)[config.keep_last :], config.keep_every_steps
    return {step for step in older if every is None or step % every}


def prune(directory: Path, *, saved_step: int, config: CheckpointConfig, keep: Collection[Path]) -> None:
    """Delete what is outdated up to the one just saved, but for those in `keep`.

    Those ahead of it are damaged ones that were skipped; they do not count. A half-deleted one has another name.
    """
    saved = [checkpoint for checkpoint in found(directory) if checkpoint.step <= saved_step]
    unneeded = outdated({checkpoint.step for checkpoint in saved}, config)
    for checkpoint in saved:
        if checkpoint.step in unneeded and checkpoint.path not in keep:
            discarded = checkpoint.path.with_name(f"{checkpoint.path.name}.tmp")
            checkpoint.path.rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)


def remove_unfinished(directory: Path, *, spare: str = "") -> None:
    """Clear away what a killed save left, but for names that end in `spare`; only for the attempt that owns the run."""
    for path in directory.glob("*.tmp"):
        if not spare or not path.name.endswith(spare):
            shutil.rmtree(path, ignore_errors=True)


def is_file_name(text: str) -> bool:
    """Whether a checkpoint may have a file by that name, beside its manifest."""
    return text == METRICS or _FILE.fullmatch(text) is not None


def _is_sound(facts: Mapping[str, Any]) -> bool:
    """Whether a manifest, which may be anybody's, has what is looked for in it, and names nothing outside its directory."""
    files = facts.get("files")
    return (
        isinstance(facts.get("sha256"), str)
        and isinstance(facts.get("step"), int)
        and isinstance(files, dict)
        and all(is_file_name(name) for name in files)
        and all(isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"} for entry in files.values())
    )


def facts_sha256(facts: Mapping[str, Any]) -> str:
    """Of the manifest itself, but for this hash."""
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
