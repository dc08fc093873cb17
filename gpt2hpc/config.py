"""Every setting of a run, frozen, with its default and its unit.

The defaults are GPT-2 124M with GPT-3's hyperparameters (Brown et al. 2020, arXiv:2005.14165, table 2.1 and
appendix B). Presets in `presets/*.yaml` change what another size needs. `config_rules` says what they must be to work;
`config_io` loads and stores them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
MicroBatch = int | Literal["auto"]
PreflightName = Literal["auto", "full", "thin", "off"]
ReduceName = Literal["fp32", "bf16"]
ScheduleName = Literal["cosine", "wsd"]
OptimizerName = Literal["adamw", "muon"]


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
        return self.inner_parameters + (13 * self.n_layer + self.vocab_size + self.block_size + 2) * self.n_embd

    @property
    def flops_per_token(self) -> int:
        """Forward and backward: 6N + 12·L·d·T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return 6 * self.parameters + 12 * self.n_layer * self.n_embd * self.block_size

    @property
    def recomputed_flops_per_token(self) -> int:
        """What train.activation_checkpointing adds: the forward pass of the blocks once more, a third of their FLOPs."""
        return 2 * 12 * self.n_layer * self.n_embd**2 + 4 * self.n_layer * self.n_embd * self.block_size

    @property
    def inner_parameters(self) -> int:
        """Those of the matrices inside the blocks."""
        return self.n_layer * 12 * self.n_embd**2

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
    """The optimizer and its learning-rate schedule: linear warm-up, then down to a share of the peak.

    Args:
        name: adamw; or muon, for the matrices inside the blocks, with adamw for embeddings, biases and layer norms. Its updates are as
            large as AdamW's, so learning_rate is of the same kind.
        learning_rate: Peak learning rate of the paper.
        lr_multiplier: Multiplies learning_rate.
        schedule: After the warm-up, cosine declines all along; wsd (warm-up, stable, decay) stays at the peak until decay_share of the
            run is left, and declines linearly then. A run with wsd can be lengthened before its decay begins.
        decay_share: Share of the run's steps in which wsd declines.
        min_lr_ratio: Share of the peak at the end of the run.
        warmup_tokens: Length of the linear warm-up, in tokens.
        beta1: AdamW's beta 1.
        beta2: AdamW's beta 2.
        eps: AdamW's epsilon.
        momentum: Muon's.
        weight_decay: Decay of the weights with two or more dimensions.
        grad_clip: Largest norm of the gradient.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 6e-4
    lr_multiplier: float = 1.0
    schedule: ScheduleName = "cosine"
    decay_share: float = 0.2
    min_lr_ratio: float = 0.1
    warmup_tokens: int = 375_000_000
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, device and what is reported. A step is always an optimizer step.

    Args:
        total_tokens: Token budget of the run.
        total_steps: Length in steps; overrides total_tokens.
        tokens_per_step: Tokens of one optimizer step, over all ranks.
        micro_batch_size: Sequences that one rank computes at once; auto finds, before the first step, the most that fit into memory.
        activation_checkpointing: Compute each block again in the backward pass instead of keeping what it has computed: the same
            numbers, for much less memory and about a third more computing.
        shard_optimizer: Each rank keeps the optimizer's state of its share of the parameters only (ZeRO, stage 1): the same numbers.
        seed: Of the initial weights, the data order and dropout.
        init: Weights to begin with instead of random ones: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the path of a transformers
            directory, of a run, of a checkpoint or of a .pt file.
        device: auto takes CUDA, then MPS, then the CPU.
        precision: auto takes bf16 or fp16 where the device computes it fast, else fp32.
        reduce_dtype: What the ranks' gradients are sent and summed in; bf16 is half the bytes, and a few bits of them are lost.
        compile: torch.compile; null is on for CUDA and off elsewhere.
        cuda_graphs: Replay the compiled step on a GPU instead of launching its kernels one by one: faster for little models and
            micro batches.
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
    micro_batch_size: MicroBatch = 16
    activation_checkpointing: bool = False
    shard_optimizer: bool = False
    seed: int = 1337
    init: str | None = None
    device: DeviceName = "auto"
    precision: PrecisionName = "auto"
    reduce_dtype: ReduceName = "fp32"
    compile: bool | None = None
    cuda_graphs: bool = False
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
    def rows(self) -> int:
        """micro_batch_size as a number: 1 for auto, which is what any size is a multiple of, until it is found."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

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
        patience_s: Seconds to wait for a shard to come, also while the Hub is down.
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
        optimizer: AdamW or Muon, and the learning-rate schedule.
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

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint, about: weights and AdamW's two moments, or Muon's one, in fp32."""
        return 12 * self.model.parameters - self.spared_bytes

    @property
    def spared_bytes(self) -> int:
        """What Muon saves, on disk and on the device: the second moment of what it steps with."""
        return 4 * self.model.inner_parameters if self.optimizer.name == "muon" else 0

    @property
    def warmup_steps(self) -> int:
        """Of the linear warm-up."""
        return self.optimizer.warmup_tokens // self.train.tokens_per_step

    @property
    def decay_begins(self) -> int | None:
        """The finished steps at which the learning rate begins to decline, where the schedule is wsd."""
        if self.optimizer.schedule != "wsd":
            return None
        return self.train.steps - max(1, round(self.optimizer.decay_share * self.train.steps))
