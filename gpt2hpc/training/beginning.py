"""Where an attempt begins: at step 0, with random weights or given ones, or where a checkpoint left off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpt2hpc.config import Config, TrainConfig
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, initial, metrics, resume, state
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.schedule import relengthened
from gpt2hpc.training.state import RankState

Say = Callable[[str], None]


@dataclass(frozen=True)
class Beginning:
    """Steps that are done, samples that were consumed in them, and this rank's random generators."""

    step: int
    consumed: int
    rank_state: RankState


def find(run: RunDir, config: Config, say: Say) -> tuple[Checkpoint | None, str]:
    """The checkpoint to go on from, whose log becomes the run's, and the run's identity. For rank 0."""
    found = resume.find(run, config, say=say)
    if found is not None:
        metrics.restore(run, found.path / checkpoint.METRICS, found.step)
    return found, resume.identity(run)


def at_step_0(config: Config, ranks: Ranks, learner: Learner, say: Say) -> Beginning:
    """With random weights, or with those of `train.init`; rank 0's are everyone's once DDP begins. Collective."""
    init = config.train.init
    if init is not None:
        ranks.first_works(lambda: learner.begin_with(initial.initial_weights(init, config.model)))
    say(f"starting at step 0: {config.model.tag}" + (f" with the weights of {init}" if init else ""))
    return Beginning(0, 0, _fresh(config, ranks, 0))


def at(found: Checkpoint, config: Config, ranks: Ranks, learner: Learner, say: Say) -> Beginning:
    """With all that was saved: bit-identical on as many ranks with as many threads and micro batches as large.

    Other ranks have random generators of their own.
    """
    facts, threads = found.manifest(), torch.get_num_threads()
    learner.load(found, facts["scaler"])
    step, same = facts["step"], facts["world_size"] == ranks.world_size
    others = "" if same else f", {facts['world_size'] or 'not our'} ranks before"
    say(f"resuming at step {step} from {found.path.name}{others}")
    if warning := relengthened(step, config, _length_of(facts, config)):
        say(warning)
    if same and facts["threads"] != threads:
        say(f"warning: {threads} threads a rank instead of {facts['threads']}: not bit-identical on a CPU")
    rows, before = config.train.rows, facts["config"]["train"]["micro_batch_size"]
    if same and rows != before:
        say(f"warning: micro batches of {rows} instead of {before}: not bit-identical")
    rank_state = found.rank_state(ranks.rank) if same else _fresh(config, ranks, step)
    return Beginning(step, facts["data"]["samples_consumed"], rank_state)


def _length_of(facts: dict[str, Any], config: Config) -> TrainConfig:
    """The settings with the length that the run had when it was saved."""
    train, saved = config.train, facts["config"]["train"]
    length = {key: saved.get(key, getattr(train, key)) for key in ("total_tokens", "total_steps")}
    return dataclasses.replace(train, **length)


def _fresh(config: Config, ranks: Ranks, step: int) -> RankState:
    state.seed_rank(config.train.seed, ranks.rank, step)
    return state.rank_state(ranks.device)
