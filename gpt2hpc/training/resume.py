"""Where a run goes on: from its own furthest whole checkpoint, from one on the Hub, from one that was named, or at step 0."""

from __future__ import annotations

import dataclasses
import functools
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2hpc import config_io, durable
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import Config
from gpt2hpc.data.patience import HubDownError
from gpt2hpc.errors import ConfigError, DataError, RunDirError, StoppedError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, hub_access, hub_checkpoints
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.hub_access import Finding
from gpt2hpc.training.hub_checkpoints import Accept, Remote

Say = Callable[[str], None]

WAITS_S = (1.0, 5.0, 15.0, 30.0, 60.0)
"""Before a Hub that is busy is asked again, where there is nothing else to go on from."""

_MUST_FIT = [
    "data.manifest_sha256",
    "optimizer.name",
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
    if config.checkpoint.repo is not None and (wish == "auto" or _has_saved(run)):
        own = _further(config.checkpoint.repo, run, config, own, say) or own
    if own is None and (damaged := checkpoint.found(run.checkpoints)):
        raise RunDirError(
            f"each of the {len(damaged)} checkpoints in {run.checkpoints} is damaged; bring a whole one back, "
            "or delete them to start at step 0"
        )
    if own is not None:
        refuse_other(own, config, _own_keys(config))
        adopt(run, own)
        return own
    if wish in ("auto", "none"):
        return None
    named = _named(wish, run, config, say)
    refuse_other(named, config, _MUST_FIT)
    for key, (there, here) in differing(named, config, _keys(config)).items():
        if not config_io.may_change(key):
            say(f"going on from {named.path.name} with another {key}: {here} instead of {there}")
    return named


def identity(run: RunDir) -> str:
    """What all checkpoints of one run have in their manifests, wherever it goes on; made here if there is none yet."""
    durable.create_text(run.identity, secrets.token_hex(8))
    return run.identity.read_text(encoding="utf-8").strip()


def adopt(run: RunDir, found: Checkpoint) -> None:
    """Make this run the one that saved `found`, which lies in its `checkpoints/`: it may come from another disk."""
    if (word := found.manifest().get("run")) and identity(run) != word:
        durable.publish_text(run.identity, word)


def same_run(run: RunDir) -> Accept:
    """Passes over the checkpoints of other runs, once this one has saved something."""
    here = [facts for found in checkpoint.found(run.checkpoints) if (facts := found.manifest())]
    any_run = not here and not _has_saved(run)
    own = None if any_run else here[0].get("run") if here else identity(run)

    def accept(found: Checkpoint) -> None:
        if not any_run and found.manifest().get("run") != own:
            raise hub_checkpoints.OfAnotherRunError

    return accept


def _has_saved(run: RunDir) -> bool:
    """Here and now or, as the ledger knows, once."""
    attempts = Ledger(run).attempts() if run.attempts.is_dir() else []
    return run.has_checkpoints or any(attempt.saved_step > attempt.first_step for attempt in attempts)


def _further(repo: str, run: RunDir, config: Config, own: Checkpoint | None, say: Say) -> Checkpoint | None:
    """One on the Hub that is further than what is here, fetched.

    With a checkpoint here, a Hub that is not reached, or fails, has none. Without one, a Hub that is there but fails is asked for
    minutes, and then StoppedError ends the attempt: to begin at step 0 would make another run beside the one that is there.
    """
    unreached = _access(repo, patient=own is None)
    if unreached is not None and unreached.hub == "busy" and own is None:
        raise StoppedError(_BUSY.format(repo=repo, why=unreached.text))
    why = unreached.text if unreached is not None else ""
    if unreached is None:
        try:
            found = _fetched(hub_checkpoints.remote(repo), run, config, own, say)
        except HubDownError as error:
            if own is None:
                raise StoppedError(_BUSY.format(repo=repo, why=error.line)) from error
            why = error.line
        except DataError as error:
            if own is None:
                raise
            why = error.line
        else:
            if found is None and own is None and _has_saved(run) and not checkpoint.found(run.checkpoints):
                raise RunDirError(_LOST.format(run=run, repo=repo, why="which holds nothing of this run"))
            return found
    if own is None and _has_saved(run):
        raise RunDirError(_LOST.format(run=run, repo=repo, why=f"which is not reached ({why})"))
    begins = "" if own is not None else "; beginning at step 0, though it may hold a checkpoint to go on from"
    say(
        f"warning: hf://{repo} is not reached{begins}: {why}; on a node with a network, `gpt2hpc sync {run.path}` uploads "
        "what waits, and with --pull fetches what is further"
    )
    return None


_BUSY = (
    "nothing is here to go on from, and hf://{repo}, which may hold a checkpoint, fails now ({why}); the same command tries again, "
    "and --resume none begins at step 0"
)
_LOST = (
    "{run.checkpoints} holds nothing whole, though this run has saved something, and nor does hf://{repo}, {why}; bring a checkpoint "
    "back, fetch it with `gpt2hpc sync {run.path} --pull` on a node with a network, or begin anew in another --run-dir"
)


def _access(repo: str, *, patient: bool) -> Finding | None:
    """Why the Hub does not answer now; `patient`, one that is busy is asked again."""
    unreached = hub_access.access(repo, create=True)
    for wait_s in WAITS_S if patient else ():
        if unreached is None or unreached.hub != "busy":
            break
        time.sleep(wait_s)
        unreached = hub_access.access(repo, create=True)
    return unreached


def _fetched(
    candidates: Sequence[Remote], run: RunDir, config: Config, own: Checkpoint | None, say: Say
) -> Checkpoint | None:
    """The furthest of this run's; of another one's, with all the same settings, if this has saved nothing: it becomes that one."""
    same, keys = same_run(run), _own_keys(config)
    if not _has_saved(run):
        keys.append("train.init")

    def accept(found: Checkpoint) -> None:
        same(found)
        refuse_other(found, config, keys)

    found = hub_checkpoints.fetch_furthest(candidates, run.checkpoints, beyond=own, say=say, accept=accept)
    checkpoint.remove_unfinished(run.checkpoints)
    return found


def _named(wish: str, run: RunDir, config: Config, say: Say) -> Checkpoint:
    """The checkpoint that `--resume` names."""
    if hub_checkpoints.is_remote(wish):
        run.fetched.mkdir(exist_ok=True)
        whence = run.fetched / "whence"
        if whence.exists() and whence.read_text() == wish and (there := checkpoint.newest_valid(run.fetched, say)):
            return there  # of an attempt that has saved nothing; the Hub may be gone, or further, by now
        shutil.rmtree(run.fetched)
        run.fetched.mkdir()
        chosen = hub_checkpoints.choose(hub_checkpoints.parse(wish))
        fits = functools.partial(refuse_other, config=config, keys=_MUST_FIT)
        found = hub_checkpoints.fetch(chosen, run.fetched, accept=fits)
        durable.publish_text(whence, wish)
        return found
    path = Path(wish)
    if path.is_file():
        run.fetched.mkdir(exist_ok=True)
        return imported(path, run.fetched, config, say)
    return checkpoint.at(path, say)


def imported(path: Path, directory: Path, config: Config, say: Say) -> Checkpoint:
    """A `.pt` file of another project as a checkpoint of ours in `directory`, which any number of ranks can go on from."""
    import safetensors.torch

    from gpt2hpc.model import fit
    from gpt2hpc.training import pt_file

    file = pt_file.read(path)
    if not file.has_optimizer:
        raise ConfigError(f"--resume={path} holds no AdamW state to go on with; use --init for its weights alone")
    if config.optimizer.name != "adamw":
        raise ConfigError(
            f"--resume={path} holds AdamW's state, but optimizer.name={config.optimizer.name}; use --optimizer.name adamw, or --init "
            "for its weights alone"
        )
    loss = "" if file.val_loss is None else f", validation loss {file.val_loss:.4f}"
    say(f"{path}: weights, AdamW's moments and the step{loss}; not bit-identical to where it comes from")
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
    """Settings that tell runs apart: not where the first weights came from, nor a size that may be found (`beginning` tells)."""
    others = ("train.init", "train.micro_batch_size")
    return [key for key, _ in config_io.flat(dataclasses.asdict(config)) if key not in others]


def _config_of(found: Checkpoint) -> dict[str, Any]:
    facts: Mapping[str, Any] = found.manifest()
    try:
        return {
            **facts["config"],
            "data": {**facts["config"]["data"], "manifest_sha256": facts["data"]["manifest_sha256"]},
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{found.path.name} is of another version: its settings do not fit ({error})") from None
