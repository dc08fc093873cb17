"""Every setting of a run, frozen, with its default, its unit and its checks.

The defaults are GPT-2 124M with GPT-3's hyperparameters (Brown et al. 2020, arXiv:2005.14165, table 2.1 and
appendix B). Presets in `presets/*.yaml` change what another size needs. `config_io` loads and stores them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gpt2hpc.errors import ConfigError

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
PreflightName = Literal["auto", "full", "thin", "off"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2).

    Args:
        n_layer: Number of blocks.
        n_head: Attention heads a block.
        n_embd: Width; a multiple of n_head.
        block_size: Context length in tokens.
        vocab_size: Tokens that exist; GPT-2 has 50257.
        padded_vocab_size: Rows of the embedding; those past vocab_size have probability zero and only make matrix products faster.
        dropout: Probability of dropping an activation, 0 to below 1.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50_257
    padded_vocab_size: int = 50_304
    dropout: float = 0.0

    @property
    def parameters(self) -> int:
        """Trainable parameters, without the rows of padding."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return self.n_layer * block + (self.vocab_size + self.block_size + 2) * self.n_embd

    @property
    def flops_per_token(self) -> int:
        """Forward and backward: 6N + 12·L·d·T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return 6 * self.parameters + 12 * self.n_layer * self.n_embd * self.block_size

    @property
    def tag(self) -> str:
        """Names the model in checkpoints, from its true size: `gpt2-124m-ctx1024`."""
        million = self.parameters / 1e6
        return (
            f"gpt2-{million:.0f}m-ctx{self.block_size}"
            if million >= 1
            else f"gpt2-{million * 1e3:.0f}k-ctx{self.block_size}"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule: linear warm-up, then cosine down to a share of the peak.

    Args:
        learning_rate: Peak learning rate of the paper.
        lr_multiplier: Multiplies learning_rate.
        min_lr_ratio: Share of the peak at the end of the run.
        warmup_tokens: Length of the linear warm-up, in tokens.
        beta1: AdamW's beta 1.
        beta2: AdamW's beta 2.
        eps: AdamW's epsilon.
        weight_decay: Decay of the weights with two or more dimensions.
        grad_clip: Largest norm of the gradient.
    """

    learning_rate: float = 6e-4
    lr_multiplier: float = 1.0
    min_lr_ratio: float = 0.1
    warmup_tokens: int = 375_000_000
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, device and what is reported. A step is always an optimizer step.

    Args:
        total_tokens: Token budget of the run.
        total_steps: Length in steps; overrides total_tokens.
        tokens_per_step: Tokens of one optimizer step, over all ranks.
        micro_batch_size: Sequences that one rank computes at once.
        seed: Of the initial weights, the data order and dropout.
        init: Weights to begin with instead of random ones: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the path of a transformers
            directory, of a run, of a checkpoint or of a .pt file.
        device: auto takes CUDA, then MPS, then the CPU.
        precision: auto takes bf16 or fp16 where the device computes it fast, else fp32.
        compile: torch.compile; null is on for CUDA and off elsewhere.
        deterministic: Bit-identical results on CUDA too, somewhat slower.
        log_every: Steps between log lines.
        eval_every: Steps between validations; there is one at the start and one at the end too.
        eval_tokens: Tokens of a validation, the same ones each time.
        hellaswag: Examples of HellaSwag to be answered during the training: its JSON Lines or parquet file, what
            `gpt2hpc stage --hellaswag` made, or hf://datasets/Rowan/hellaswag; null for none.
        hellaswag_every: Steps between those evaluations; there is one at the end too.
        hellaswag_examples: The first so many of the 10,042 examples; null for all.
        sample_every: Steps between texts that the model writes to RUN/samples/, also at the end; null for none.
        tensorboard: Write event files to RUN/tensorboard/; needs gpt2hpc[tensorboard].
        wandb: Project of Weights & Biases, as PROJECT or ENTITY/PROJECT, that gets the metrics too; needs gpt2hpc[wandb].
        trace_data: Write the sample numbers each rank consumes to RUN/trace/.
        preflight: What is asked of the nodes before each start: full compares GPUs, disks, data, versions and clocks and times an
            all-reduce; thin leaves out the timing, and but warns of a node's fault; auto is full in a batch job, thin elsewhere.
        min_allreduce_gb_s: Bus bandwidth in GB/s that the all-reduce of the preflight must reach; null for that of the site, if any.
    """

    total_tokens: int = 10_000_000_000
    total_steps: int | None = None
    tokens_per_step: int = 524_288
    micro_batch_size: int = 16
    seed: int = 1337
    init: str | None = None
    device: DeviceName = "auto"
    precision: PrecisionName = "auto"
    compile: bool | None = None
    deterministic: bool = False
    log_every: int = 1
    eval_every: int = 250
    eval_tokens: int = 10_485_760
    hellaswag: str | None = None
    hellaswag_every: int = 1000
    hellaswag_examples: int | None = None
    sample_every: int | None = None
    tensorboard: bool = False
    wandb: str | None = None
    trace_data: bool = False
    preflight: PreflightName = "auto"
    min_allreduce_gb_s: float | None = None

    @property
    def steps(self) -> int:
        return self.total_tokens // self.tokens_per_step if self.total_steps is None else self.total_steps


@dataclass(frozen=True)
class DataConfig:
    """Prepared data.

    Args:
        dir: Directory that `gpt2hpc prepare --out` made, or of shards of others (`*_train_*.npy`, llm.c's `.bin`); or
            `hf://datasets/USER/NAME[@REVISION]`, to be streamed.
        shuffle_shards: Shards that are shuffled together; few are kind to Lustre.
        stage: Copy shards to cache_dir before they are read, for slow shared file systems; streaming does so anyway.
        cache_dir: Directory on each node's own disk (default: below $SLURM_TMPDIR, $TMPDIR or /tmp).
        cache_gib: Most that shards may take there.
        patience_s: Seconds to wait for a shard to come.
        verify: Hash the shards in dir before the first step; a start after that hashes only what changed since.
        manifest_sha256: Identity of the data; the first start fills it in, later ones refuse other data.
    """

    dir: str = "data/demo"
    shuffle_shards: int = 4
    stage: bool = False
    cache_dir: str | None = None
    cache_gib: float = 10.0
    patience_s: float = 600.0
    verify: bool = True
    manifest_sha256: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Args:
        every_minutes: Minutes between saves.
        every_steps: Steps between saves, in addition.
        keep_last: Checkpoints kept; at least 2, so that a damaged one has a predecessor.
        keep_every_steps: Checkpoints whose step is a multiple of it are kept for good.
        repo: Model repository on the Hugging Face Hub, as USER/NAME, to which every checkpoint is uploaded beside the training.
        upload_wait_s: Seconds that a finished run waits for its last upload; `gpt2hpc sync` does what is left.
        resume: Where a run that has saved nothing begins: auto (the furthest checkpoint in repo, or step 0), none (step 0), the path of
            a checkpoint, of a run or of a .pt file, or hf://USER/NAME[@STEP]. A run goes on from its own checkpoints after that.
        stop_margin_s: Seconds left before the job's end, beside what a save takes, at which the run saves and stops.
    """

    every_minutes: float = 15.0
    every_steps: int | None = None
    keep_last: int = 3
    keep_every_steps: int | None = None
    repo: str | None = None
    upload_wait_s: float = 600.0
    resume: str = "auto"
    stop_margin_s: float = 60.0


@dataclass(frozen=True)
class RequeueConfig:
    """When a restart is worth it.

    Args:
        crash_budget: Crashes in a row without progress that are restarted.
        max_without_progress: Restarts of any cause in a row without a new checkpoint.
        backoff_s: Seconds to wait after the first crash; doubled for each further one, 600 at most.
        hang_minutes: Minutes without progress, at least, after which a training step is taken for hung: every rank dumps its
            stacks to RUN/dumps/ and the attempt ends as a crash; null to wait for ever.
        hang_factor: A step may also take so many times as long as the longest one before it.
        hang_phase_minutes: The same as hang_minutes for all that is no step: the start, the first validation, a save, the end.
    """

    crash_budget: int = 3
    max_without_progress: int = 10
    backoff_s: float = 10.0
    hang_minutes: float | None = 5.0
    hang_factor: float = 20.0
    hang_phase_minutes: float = 60.0


@dataclass(frozen=True)
class Config:
    """All settings of a run.

    Args:
        model: Shape of the model.
        optimizer: AdamW and the learning-rate schedule.
        train: Length, batch, device, reports.
        data: Prepared data.
        checkpoint: When to save, what to keep.
        requeue: When to restart.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    requeue: RequeueConfig = field(default_factory=RequeueConfig)


def check(config: Config) -> None:
    """Raise ConfigError for the first setting that cannot work, naming key, value and mend."""
    _check_ranges(config)
    model, train, optimizer = config.model, config.train, config.optimizer
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
    warmup_steps, budget = optimizer.warmup_tokens // train.tokens_per_step, train.steps * train.tokens_per_step
    if warmup_steps >= train.steps:
        raise ConfigError(
            f"optimizer.warmup_tokens={optimizer.warmup_tokens} leaves nothing of the run's {budget} tokens; "
            f"try --optimizer.warmup_tokens {budget // 10}"
        )
    grad_accum_steps(config, world_size=1)


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
        "train.micro_batch_size": train.micro_batch_size,
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
        "train.seed": train.seed,
        "checkpoint.stop_margin_s": config.checkpoint.stop_margin_s,
        "checkpoint.upload_wait_s": config.checkpoint.upload_wait_s,
        "requeue.crash_budget": config.requeue.crash_budget,
        "requeue.max_without_progress": config.requeue.max_without_progress,
        "requeue.backoff_s": config.requeue.backoff_s,
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{key}={value} must be 0 or above")
    shares = {"model.dropout": model.dropout, "optimizer.beta1": optimizer.beta1, "optimizer.beta2": optimizer.beta2}
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{key}={value} must be 0 or above and below 1")
    if not 0 <= optimizer.min_lr_ratio <= 1:
        raise ConfigError(f"optimizer.min_lr_ratio={optimizer.min_lr_ratio} must be from 0 to 1")
    if config.checkpoint.keep_last < 2:
        raise ConfigError(
            f"checkpoint.keep_last={config.checkpoint.keep_last} leaves no predecessor for a damaged checkpoint; use 2 or more"
        )


def grad_accum_steps(config: Config, *, world_size: int) -> int:
    """Micro batches that a rank computes in a step; ConfigError where they do not fill the step exactly."""
    train, block_size = config.train, config.model.block_size
    unit = train.micro_batch_size * block_size * world_size
    if train.tokens_per_step % unit:
        below, above = train.tokens_per_step // unit * unit, _round_up(train.tokens_per_step, unit)
        near = above if not below or above - train.tokens_per_step < train.tokens_per_step - below else below
        raise ConfigError(
            f"train.tokens_per_step={train.tokens_per_step} is not a multiple of train.micro_batch_size × model.block_size × "
            f"world size = {train.micro_batch_size} × {block_size} × {world_size} = {unit}; "
            f"{_batch_mend(config, world_size)}try train.tokens_per_step={near}"
        )
    return train.tokens_per_step // unit


def _batch_mend(config: Config, world_size: int) -> str:
    """A micro batch that leaves the mathematics alone, where there is one."""
    samples, rest = divmod(config.train.tokens_per_step, config.model.block_size * world_size)
    if rest:
        return ""
    fitting = max(size for size in range(1, config.train.micro_batch_size + 1) if samples % size == 0)
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
