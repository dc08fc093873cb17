"""What settings must be for a run to work, alone and together; and what works, but wastes a GPU."""

from __future__ import annotations

import math

from gpt2hpc.config import Config
from gpt2hpc.errors import ConfigError

SEEDS = 2**64
"""That torch takes, from 0."""


def check(config: Config) -> None:
    """Raise ConfigError for the first setting that cannot work, naming key, value and mend."""
    _check_ranges(config)
    model, train = config.model, config.train
    if model.n_embd % model.n_head:
        better = _round_up(model.n_embd, model.n_head)
        raise ConfigError(f"model.n_embd={model.n_embd} is not a multiple of model.n_head={model.n_head}; try {better}")
    if model.padded_vocab_size < model.vocab_size:
        better = _round_up(model.vocab_size, 128)
        raise ConfigError(
            f"model.padded_vocab_size={model.padded_vocab_size} is below model.vocab_size={model.vocab_size}; try {better}"
        )
    if train.steps < 1:
        raise ConfigError(
            f"train.total_tokens={train.total_tokens} is less than one step of train.tokens_per_step={train.tokens_per_step}; "
            f"raise it to {train.tokens_per_step} or more"
        )
    if train.cuda_graphs and train.compile is False:
        raise ConfigError(
            "train.cuda_graphs=true replays what is compiled, and train.compile=false; leave out one of them"
        )
    if train.cuda_graphs and train.shard_optimizer:
        raise ConfigError(
            "train.cuda_graphs=true keeps gradients where they are, and train.shard_optimizer=true does not; leave out one of them"
        )
    _check_schedule(config)
    grad_accum_steps(config, world_size=1)


def _check_schedule(config: Config) -> None:
    optimizer, steps, begins = config.optimizer, config.train.steps, config.decay_begins
    budget = steps * config.train.tokens_per_step
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_tokens={optimizer.warmup_tokens} leaves nothing of the run's {budget} tokens; "
            f"try --optimizer.warmup_tokens {budget // 10}"
        )
    if begins is not None and begins < config.warmup_steps:
        raise ConfigError(
            f"optimizer.decay_share={optimizer.decay_share} of {steps} steps begins at step {begins}, in the warm-up of "
            f"{config.warmup_steps} steps; try --optimizer.warmup_tokens {budget // 10} or a smaller share"
        )


def _check_ranges(config: Config) -> None:
    model, optimizer, train = config.model, config.optimizer, config.train
    positive: dict[str, float | None] = {
        "model.n_layer": model.n_layer,
        "model.n_head": model.n_head,
        "model.n_embd": model.n_embd,
        "model.block_size": model.block_size,
        "model.vocab_size": model.vocab_size,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.lr_multiplier": optimizer.lr_multiplier,
        "optimizer.eps": optimizer.eps,
        "optimizer.grad_clip": optimizer.grad_clip,
        "train.total_tokens": train.total_tokens,
        "train.total_steps": train.total_steps,
        "train.tokens_per_step": train.tokens_per_step,
        "train.micro_batch_size": train.rows,
        "train.log_every": train.log_every,
        "train.eval_every": train.eval_every,
        "train.eval_tokens": train.eval_tokens,
        "train.hellaswag_every": train.hellaswag_every,
        "train.hellaswag_examples": train.hellaswag_examples,
        "train.sample_every": train.sample_every,
        "train.min_allreduce_gb_s": train.min_allreduce_gb_s,
        "data.shuffle_shards": config.data.shuffle_shards,
        "data.cache_gib": config.data.cache_gib,
        "data.patience_s": config.data.patience_s,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep_every_steps": config.checkpoint.keep_every_steps,
        "requeue.hang_minutes": config.requeue.hang_minutes,
        "requeue.hang_factor": config.requeue.hang_factor,
        "requeue.hang_phase_minutes": config.requeue.hang_phase_minutes,
    }
    for key, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{key}={value} must be above 0")
    not_negative: dict[str, float] = {
        "optimizer.warmup_tokens": optimizer.warmup_tokens,
        "optimizer.weight_decay": optimizer.weight_decay,
        "checkpoint.stop_margin_s": config.checkpoint.stop_margin_s,
        "checkpoint.upload_wait_s": config.checkpoint.upload_wait_s,
        "requeue.crash_budget": config.requeue.crash_budget,
        "requeue.max_without_progress": config.requeue.max_without_progress,
        "requeue.backoff_s": config.requeue.backoff_s,
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{key}={value} must be 0 or above")
    if not 0 <= train.seed < SEEDS:
        raise ConfigError(f"train.seed={train.seed} must be 0 or above, and below 2^64")
    shares = {
        "model.dropout": model.dropout,
        "optimizer.beta1": optimizer.beta1,
        "optimizer.beta2": optimizer.beta2,
        "optimizer.momentum": optimizer.momentum,
    }
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{key}={value} must be 0 or above and below 1")
    if not 0 < optimizer.decay_share <= 1:
        raise ConfigError(f"optimizer.decay_share={optimizer.decay_share} must be above 0, and 1 at most")
    if not 0 <= optimizer.min_lr_ratio <= 1:
        raise ConfigError(f"optimizer.min_lr_ratio={optimizer.min_lr_ratio} must be from 0 to 1")
    if config.checkpoint.keep_last < 2:
        raise ConfigError(
            f"checkpoint.keep_last={config.checkpoint.keep_last} leaves no predecessor for a damaged checkpoint; use 2 or more"
        )


def grad_accum_steps(config: Config, *, world_size: int) -> int:
    """Micro batches that a rank computes in a step, of one sequence for auto; ConfigError where they do not fill it exactly."""
    train, block_size = config.train, config.model.block_size
    unit = train.rows * block_size * world_size
    if train.tokens_per_step % unit:
        below, above = train.tokens_per_step // unit * unit, _round_up(train.tokens_per_step, unit)
        near = above if not below or above - train.tokens_per_step < train.tokens_per_step - below else below
        raise ConfigError(
            f"train.tokens_per_step={train.tokens_per_step} is not a multiple of train.micro_batch_size × model.block_size × "
            f"world size = {train.rows} × {block_size} × {world_size} = {unit}; "
            f"{_batch_mend(config, world_size)}try train.tokens_per_step={near}"
        )
    return train.tokens_per_step // unit


def _batch_mend(config: Config, world_size: int) -> str:
    """A micro batch that leaves the mathematics alone, where there is one."""
    samples, rest = divmod(config.train.tokens_per_step, config.model.block_size * world_size)
    if rest:
        return ""
    fitting = max(size for size in range(1, config.train.rows + 1) if samples % size == 0)
    return f"try train.micro_batch_size={fitting}, or "


def warnings(config: Config) -> list[str]:
    """Sizes that work but waste a GPU's matrix units, each with the better number."""
    model, lines = config.model, []
    if model.padded_vocab_size % 128:
        better = _round_up(model.padded_vocab_size, 128)
        lines.append(
            f"model.padded_vocab_size={model.padded_vocab_size} is not a multiple of 128; {better} is faster on a GPU"
        )
    if model.n_embd % 64:
        better = _round_up(model.n_embd, 64)
        lines.append(f"model.n_embd={model.n_embd} is not a multiple of 64; {better} is faster on a GPU")
    elif model.n_embd // model.n_head % 8:
        better = max(1, model.n_embd // 64)
        lines.append(
            f"model.n_head={model.n_head} makes heads {model.n_embd // model.n_head} wide; {better} heads of 64 are faster on a GPU"
        )
    return lines


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
