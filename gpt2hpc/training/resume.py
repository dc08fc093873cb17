"""Where a run goes on: from its own furthest whole checkpoint, from one on the Hub, from one that was named, or at step 0."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2hpc import config_io, durable
from gpt2hpc.config import Config
from gpt2hpc.data.patience import HubDownError
from gpt2hpc.errors import ConfigError, RunDirError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, hub_access, hub_checkpoints
from gpt2hpc.training.checkpoint import Checkpoint

Say = Callable[[str], None]

_MUST_FIT = [
    "data.manifest_sha256",
    *(f"model.{key}" for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "padded_vocab_size")),
]
"""Without these a checkpoint cannot be gone on from, whoever wants it."""


def find(run: RunDir, config: Config, *, say: Say) -> Checkpoint | None:
    """What to load; None to begin at step 0. For rank 0 of the attempt that owns the run.

    Raises RunDirError where every checkpoint is damaged, and ConfigError where the one to go on from is of another model
    or data.
    """
    checkpoint.remove_unfinished(run.checkpoints, spare=hub_checkpoints.PARTIAL)  # which is gone on with
    own, wish = checkpoint.newest_valid(run.checkpoints, say), config.checkpoint.resume
    if config.checkpoint.repo is not None and (own is not None or wish == "auto"):
        own = _further(config.checkpoint.repo, run, config, own, say) or own
    if own is None and (damaged := checkpoint.found(run.checkpoints)):
        raise RunDirError(
            f"each of the {len(damaged)} checkpoints in {run.checkpoints} is damaged; bring a whole one back, "
            "or delete them to start at step 0"
        )
    if own is not None:
        refuse_other(own, config, _own_keys(config))
        return own
    if wish in ("auto", "none"):
        return None
    named = _named(wish, run, config, say)
    refuse_other(named, config, _MUST_FIT)
    for key, (there, here) in differing(named, config, _keys(config)).items():
        if not config_io.may_change(key):
            say(f"going on from {named.path.name} with another {key}: {here} instead of {there}")
    return named


def _further(repo: str, run: RunDir, config: Config, own: Checkpoint | None, say: Say) -> Checkpoint | None:
    """One on the Hub that is further than what is here, fetched; a Hub that is not reached has none."""
    try:
        if (unreachable := hub_access.access(repo, create=True)) is None:
            accept = functools.partial(refuse_other, config=config, keys=_own_keys(config))
            found = hub_checkpoints.fetch_furthest(repo, run.checkpoints, beyond=own, say=say, accept=accept)
            checkpoint.remove_unfinished(run.checkpoints)
            return found
    except HubDownError as error:
        unreachable = error.line
    begins = "" if own is not None else "; beginning at step 0, though it may hold a checkpoint to go on from"
    say(
        f"warning: hf://{repo} is not reached{begins}: {unreachable}; on a node with a network, `gpt2hpc sync {run.path}` uploads "
        "what waits, and with --pull fetches what is further"
    )
    return None


def _named(wish: str, run: RunDir, config: Config, say: Say) -> Checkpoint:
    """The checkpoint that `--resume` names."""
    if hub_checkpoints.is_remote(wish):
        run.fetched.mkdir(exist_ok=True)
        chosen = hub_checkpoints.choose(hub_checkpoints.parse(wish))
        return hub_checkpoints.fetch(
            chosen, run.fetched, accept=functools.partial(refuse_other, config=config, keys=_MUST_FIT)
        )
    path = Path(wish)
    if path.is_file():
        run.fetched.mkdir(exist_ok=True)
        say(f"reading {path}: weights, AdamW's moments and the step; not bit-identical to where it comes from")
        return imported(path, run.fetched, config)
    return checkpoint.at(path, say)


def imported(path: Path, directory: Path, config: Config) -> Checkpoint:
    """A `.pt` file of another project as a checkpoint of ours in `directory`, which any number of ranks can go on from."""
    import safetensors.torch

    from gpt2hpc.model import fit
    from gpt2hpc.training import pt_file

    file = pt_file.read(path)
    tensors = fit.fitted(file.tensors, file.config, config.model, source=str(path), key="--resume")
    found = Checkpoint(directory / checkpoint.name(started="00000000-000000", tag=config.model.tag, step=file.step))
    shutil.rmtree(found.path, ignore_errors=True)
    found.path.mkdir()
    state = found.path / "state-00000-of-00001.safetensors"
    safetensors.torch.save_file(tensors, state)
    facts = {
        "format": checkpoint.FORMAT,
        "step": file.step,
        "world_size": 0,
        "data": {
            "samples_consumed": file.step * config.train.tokens_per_step // config.model.block_size,
            "manifest_sha256": config.data.manifest_sha256,
        },
        "measured": None,
        "scaler": file.scaler,
        "config": dataclasses.asdict(config),
        "files": {state.name: {"bytes": state.stat().st_size, "sha256": checkpoint.file_sha256(state)}},
    }
    durable.publish_json(found.path / checkpoint.MANIFEST, {**facts, "sha256": checkpoint.facts_sha256(facts)})
    return found


def refuse_other(found: Checkpoint, config: Config, keys: Iterable[str]) -> None:
    """Raise ConfigError, listing them, where these settings of a checkpoint are not those of the run."""
    if others := differing(found, config, keys):
        listed = ", ".join(f"{key}={here} (the checkpoint has {there})" for key, (there, here) in others.items())
        raise ConfigError(
            f"{found.path.name} does not fit this run: {listed}; use the settings and the data it was trained with, or --resume none "
            "and another --run-dir to begin anew"
        )


def differing(found: Checkpoint, config: Config, keys: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """The settings among `keys` that a checkpoint and a run both know and that differ, with the values of both."""
    there, here = dict(config_io.flat(_config_of(found))), dict(config_io.flat(dataclasses.asdict(config)))
    return {key: (there[key], here[key]) for key in keys if key in there and there[key] != here[key]}


def _own_keys(config: Config) -> list[str]:
    """Settings that a run must have all along."""
    return [key for key in _keys(config) if not config_io.may_change(key)]


def _keys(config: Config) -> list[str]:
    """Settings that tell runs apart; where the first weights came from does not matter to later ones."""
    return [key for key, _ in config_io.flat(dataclasses.asdict(config)) if key != "train.init"]


def _config_of(found: Checkpoint) -> dict[str, Any]:
    facts: Mapping[str, Any] = found.manifest()
    return {**facts["config"], "data": {**facts["config"]["data"], "manifest_sha256": facts["data"]["manifest_sha256"]}}
