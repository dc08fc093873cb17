"""What is checked before a run starts, here or in a queue, and nothing is written: settings, beginnings, data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from gpt2hpc import cli, config_io
from gpt2hpc.config import Config
from gpt2hpc.config_rules import check, grad_accum_steps
from gpt2hpc.data import catalog, hub, loader, shards, tokenizer
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.errors import ConfigError, DataError
from gpt2hpc.evaluation import examples
from gpt2hpc.model import hf_weights
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import hub_access, hub_checkpoints


def stored_config(run: RunDir) -> Config:
    if not run.config.exists():
        raise ConfigError(f"--run-dir={run.path} holds no run yet; give its settings, as with --preset smoke")
    return config_io.load(run.config)


def refuse_a_misnamed_run(run: RunDir, argv: Sequence[str]) -> None:
    """Raise ConfigError where --run-dir names no run and nothing says what one to begin: it is a slip, and the default takes days."""
    named = any(word.partition("=")[0] == "--run-dir" for word in argv)
    if named and not run.config.exists() and not config_io.names_settings(argv):
        raise ConfigError(
            f"--run-dir={run.path} holds no run yet, and no settings are given; begin one with --preset smoke, say"
        )


def check_start(run: RunDir, config: Config, *, world_size: int) -> tuple[Config, Manifest]:
    """Refuse what can be refused before anything is written.

    Returns the settings with the data's place and identity, and the data.
    """
    _check_settings(config, world_size=world_size)
    manifest = catalog.load(_same_commit(run, config.data.dir))
    check_data(run, config, manifest)
    if not hub.is_remote(manifest.where):
        if any(shard.sha256 is None for shard in manifest.shards):
            cli.warn(
                f"data.dir={manifest.where} has no hashes to compare its shards with; `gpt2hpc verify --adopt` notes them"
            )
        where = os.path.abspath(manifest.where)  # noqa: PTH100 -- a restart may begin elsewhere; links stay as they are
        manifest = dataclasses.replace(manifest, where=where)
    data = dataclasses.replace(config.data, dir=manifest.where, manifest_sha256=manifest.sha256)
    return _settled(run, dataclasses.replace(config, data=data)), manifest


def check_start_without_data(run: RunDir, config: Config, *, world_size: int) -> Config:
    """The same for a run whose data is to be prepared before it starts."""
    _check_settings(config, world_size=world_size)
    where = os.path.abspath(config.data.dir)  # noqa: PTH100 -- links stay as they are
    return _settled(run, dataclasses.replace(config, data=dataclasses.replace(config.data, dir=where)))


def _check_settings(config: Config, *, world_size: int) -> None:
    check(config)
    if config.checkpoint.repo is not None and not hub.is_name(config.checkpoint.repo):
        raise ConfigError(f"checkpoint.repo={config.checkpoint.repo} is no model repository; write USER/NAME")
    grad_accum_steps(config, world_size=world_size)
    if config.train.hellaswag is not None:
        examples.check_model(config.model)
    if config.train.sample_every is not None and config.model.vocab_size != tokenizer.VOCAB_SIZE:
        raise ConfigError(
            f"train.sample_every={config.train.sample_every}, but model.vocab_size={config.model.vocab_size} is not GPT-2's "
            f"{tokenizer.VOCAB_SIZE}, so its tokens are no text here; leave it out"
        )


def check_data(run: RunDir, config: Config, manifest: Manifest) -> None:
    """Raise ConfigError or DataError where the run cannot be trained on this data, or shards are not there whole."""
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is below the {manifest.vocab_size} tokens of data.dir="
            f"{config.data.dir}; set it to {manifest.vocab_size}"
        )
    known = config.data.manifest_sha256
    if known is not None and known != manifest.sha256 and run.has_checkpoints:
        raise DataError(
            f"data.dir={config.data.dir} changed under the run: its manifest is {manifest.sha256[:12]}…, the run began with "
            f"{known[:12]}…; restore the data, or choose another --run-dir"
        )
    loader.check_windows(manifest, config.model.block_size)
    if not hub.is_remote(manifest.where):
        for shard in manifest.shards:
            shards.check_size(Path(manifest.where) / shard.file, shard)


def _settled(run: RunDir, config: Config) -> Config:
    """The settings as any restart will find what they name; ConfigError where they are not those of the run."""
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, init=_beginning(run, "--init", config.train.init), hellaswag=_located(config.train.hellaswag)
        ),
        checkpoint=dataclasses.replace(config.checkpoint, resume=_beginning(run, "--resume", config.checkpoint.resume)),
    )
    config_io.changes(run, config)
    _check_resume(run, config)
    return config


def _located(hellaswag: str | None) -> str | None:
    """A place that a restart finds too; DataError where there is nothing."""
    if hellaswag is None:
        return None
    examples.check(hellaswag)
    return hellaswag if hub.is_remote(hellaswag) else os.path.abspath(hellaswag)  # noqa: PTH100 -- links stay as they are


Named = TypeVar("Named", str, str | None)


def _beginning(run: RunDir, option: str, named: Named) -> Named:
    """What a run begins with, as any restart will find it; ConfigError where there is no such thing and the run needs it still."""
    if named is None or named in ("auto", "none") or (option == "--init" and hf_weights.is_published(named)):
        return named
    if option == "--resume" and hub_checkpoints.is_remote(named):
        hub_checkpoints.parse(named)
        return named
    if not Path(named).exists() and not run.has_checkpoints:
        others = "auto, none or hf://USER/NAME" if option == "--resume" else ", ".join(hf_weights.PUBLISHED)
        raise ConfigError(f"{option}={named} does not exist; name a path that does, or one of {others}")
    return os.path.abspath(named)  # noqa: PTH100 -- links stay as they are


def _check_resume(run: RunDir, config: Config) -> None:
    """A run that has saved something goes on from that; to begin elsewhere is for another one."""
    wish = config.checkpoint.resume
    if wish != "auto" and run.has_checkpoints and run.config.exists() and stored_config(run).checkpoint.resume != wish:
        raise ConfigError(
            f"--resume={wish}, but {run.path} has checkpoints of its own, from which it goes on; drop --resume, or choose another "
            "--run-dir to begin with it"
        )


def check_repo(config: Config) -> None:
    """Raise MissingError where uploads would be refused. A Hub that is not reached is no error: they will wait."""
    if config.checkpoint.repo is not None:
        hub_access.access(config.checkpoint.repo, create=True)


def _same_commit(run: RunDir, where: str) -> str:
    """A Hub dataset that is named without a revision stays, for a run that has begun, at the commit that it began with."""
    if (
        hub.is_remote(where)
        and run.has_checkpoints
        and run.config.exists()
        and (wanted := hub.parse(where)).revision is None
    ):
        before = stored_config(run).data.dir
        if hub.is_remote(before) and hub.parse(before).repo == wanted.repo:
            return before
    return where
