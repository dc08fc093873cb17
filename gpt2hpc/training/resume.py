"""Where a run goes on: from its own furthest whole checkpoint, from one on the Hub, from one that was named, or at step 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2hpc import config_io
from gpt2hpc.config import Config
from gpt2hpc.errors import ConfigError, RunDirError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint
from gpt2hpc.training.checkpoint import Checkpoint

Say = Callable[[str], None]

_MUST_FIT = [
    "data.manifest_sha256",
    *(f"model.{key}" for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "padded_vocab_size")),
]
"""Without these a checkpoint cannot be gone on from, whoever wants it."""


def find(run: RunDir, config: Config, *, started: str, say: Say) -> Checkpoint | None:
    """What to load; None to begin at step 0. For rank 0 of the attempt that owns the run.

    Args:
        started: Names the checkpoints of this run, if it has none yet.

    Raises RunDirError where every checkpoint is damaged, and ConfigError where the one to go on from is of another model
    or data.
    """
    checkpoint.remove_unfinished(run.checkpoints)
    own, wish = checkpoint.newest_valid(run.checkpoints, say), config.checkpoint.resume
    if own is None and (damaged := checkpoint.found(run.checkpoints)):
        raise RunDirError(
            f"each of the {len(damaged)} checkpoints in {run.checkpoints} is damaged; bring a whole one back, "
            "or delete them to start at step 0"
        )
    if own is not None:
        refuse_other(own, config, [key for key in _keys(config) if not config_io.may_change(key)])
        return own
    if wish in ("auto", "none"):
        return None
    named = checkpoint.at(Path(wish), say)
    refuse_other(named, config, _MUST_FIT)
    for key, (there, here) in differing(named, config, _keys(config)).items():
        if not config_io.may_change(key):
            say(f"going on from {named.path.name} with another {key}: {here} instead of {there}")
    return named


def refuse_other(found: Checkpoint, config: Config, keys: Iterable[str]) -> None:
    """Raise ConfigError, listing them, where these settings of a checkpoint are not those of the run."""
    if others := differing(found, config, keys):
        listed = ", ".join(f"{key}={here} (the checkpoint has {there})" for key, (there, here) in others.items())
        raise ConfigError(
            f"{found.path} does not fit this run: {listed}; use the settings and the data it was trained with, or --resume none "
            "and another --run-dir to begin anew"
        )


def differing(found: Checkpoint, config: Config, keys: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """The settings among `keys` that a checkpoint and a run both know and that differ, with the values of both."""
    there, here = dict(config_io.flat(_config_of(found))), dict(config_io.flat(dataclasses.asdict(config)))
    return {key: (there[key], here[key]) for key in keys if key in there and there[key] != here[key]}


def _keys(config: Config) -> list[str]:
    """Settings that tell runs apart; where the first weights came from does not matter to later ones."""
    return [key for key, _ in config_io.flat(dataclasses.asdict(config)) if key != "train.init"]


def _config_of(found: Checkpoint) -> dict[str, Any]:
    facts: Mapping[str, Any] = found.manifest()
    return {**facts["config"], "data": {**facts["config"]["data"], "manifest_sha256": facts["data"]["manifest_sha256"]}}
