"""What a plan is asked: settings, machine and rates, each from a flag, the site's profile, a run's own numbers or a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt2hpc.cluster import slurm
from gpt2hpc.cluster.choices import Choices
from gpt2hpc.config import Config
from gpt2hpc.errors import UsageError
from gpt2hpc.planning import hardware
from gpt2hpc.planning.assumptions import DEFAULT, FLAG, MEASURED, SETTINGS, Assumption, Assumptions
from gpt2hpc.planning.hardware import Gpu
from gpt2hpc.planning.measured import Observed
from gpt2hpc.planning.scaling import Fabric, Share, Traffic
from gpt2hpc.planning.storage import checkpoint_bytes, stored_parameters

COPY_BYTES_PER_S = 11e9
"""At which a rank copies its share of a checkpoint while the steps wait: 1.49 GB in 136 ms, bench/results/checkpoint.md."""
WRITE_BYTES_PER_S = 285e6
"""At which a checkpoint is hashed, written, synced and read back: 1.49 GB in 5.22 s, in the same place."""
START_S = 180.0
REQUEUE_S = 30.0
MTBF_NODE_HOURS = 6300.0
"""2,048 nodes × 54 days × 24 h / 419 unexpected interruptions."""


@dataclass(frozen=True)
class Base:
    """A training on so many GPUs whose rate is known: what the model scales from."""

    tokens_per_s_per_gpu: float
    gpus: int
    fabric: Fabric
    share: Share
    traffic: Traffic


@dataclass(frozen=True)
class Inputs:
    """Everything that the plan is reckoned from; `nodes` are the counts asked for, of which the last is planned in full.

    `mtbf_s` is of the whole job, `save_s` from the begin of a save until it is on disk, `time_limit_s` a job's; None for no limit.
    """

    config: Config
    gpu: Gpu
    peak_tflops: float
    nodes: tuple[int, ...]
    fabric: Fabric
    base: Base
    traffic: Traffic
    stall_s: float
    save_s: float
    start_s: float
    requeue_s: float
    mtbf_s: float
    time_limit_s: int | None
    data_tokens: int
    assumptions: tuple[Assumption, ...]

    @property
    def gpus(self) -> int:
        return self.nodes[-1] * self.fabric.gpus_per_node


def gather(options: Mapping[str, Any], config: Config, env: Mapping[str, str], seen: Observed | None) -> Inputs:
    """Resolve all of them; UsageError for a flag that cannot be. `seen` is the run of --from."""
    chosen = Assumptions(dict(options))
    gpu = hardware.find(options["gpu"] or "h100")
    chosen.note("--gpu", gpu.name, "", FLAG if options["gpu"] else DEFAULT, gpu.node)
    nodes = _nodes(options["nodes"], chosen)
    site = Choices(options, env)
    limit = site.of("time")
    per_node = site.of("gpus_per_node", default=seen.gpus_per_node if seen else gpu.per_node)
    if per_node < 1:
        raise UsageError(f"--gpus-per-node={per_node} must be 1 or more")
    for name, unit in (("gpus-per-node", ""), ("time", "")):
        value, origin = site.origins.get(name, ("no limit", DEFAULT))
        measured = seen is not None and origin == DEFAULT and name == "gpus-per-node"
        chosen.note(f"--{name}", value, unit, MEASURED if measured else origin)
    _note_settings(config, chosen)
    fabric = Fabric(
        per_node,
        chosen.pick("link_gbyte_s", "GB/s a GPU", default=gpu.link_gbyte_s, source=gpu.node),
        chosen.pick("network_gbit_s", "Gbit/s a node", default=gpu.network_gbit_s, source=gpu.node),
        chosen.pick(
            "efficiency", "of those rates", default=hardware.BUS_EFFICIENCY, source="docs/plan.md, measured all-reduces"
        ),
    )
    traffic = traffic_of(config)
    peak = chosen.pick("peak_tflops", "TFLOP/s", default=gpu.peak_tflops, source="data sheet, dense bf16 (V100: fp16)")
    base = _base(config, gpu, peak, fabric, chosen, seen)
    ranks = nodes[-1] * per_node
    size = checkpoint_bytes(config.model, ranks=ranks)
    same = seen is not None and seen.config.model == config.model
    stall = chosen.pick(
        "stall_s",
        "s a save",
        measured=seen.stall_s if seen and same else None,
        default=size / ranks / COPY_BYTES_PER_S,
        source=f"{size / ranks / 1e6:,.1f} MB a rank at {COPY_BYTES_PER_S / 1e9:g} GB/s, bench/results/checkpoint.md",
    )
    save = chosen.pick(
        "save_s",
        "s until on disk",
        measured=seen.save_s if seen and same else None,
        default=size / WRITE_BYTES_PER_S,
        source=f"{size / 1e9:,.2f} GB at {WRITE_BYTES_PER_S / 1e6:g} MB/s, bench/results/checkpoint.md",
    )
    start = chosen.pick(
        "start_s", "s a start", measured=seen.start_s if seen else None, default=START_S, source="assumed; measure it"
    )
    requeue = chosen.pick(
        "requeue_s",
        "s until a job runs again",
        default=REQUEUE_S,
        source="Slurm's own delay on idle nodes; the queue comes on top",
    )
    return Inputs(
        config=config,
        gpu=gpu,
        peak_tflops=peak,
        nodes=nodes,
        fabric=fabric,
        base=base,
        traffic=traffic,
        stall_s=stall,
        save_s=max(save, stall),
        start_s=start,
        requeue_s=requeue,
        mtbf_s=_mtbf_s(options, nodes[-1], chosen, seen),
        time_limit_s=None if limit is None else 60 * slurm.minutes(str(limit)),
        data_tokens=_data_tokens(options, config, chosen),
        assumptions=tuple(chosen.all),
    )


def traffic_of(config: Config) -> Traffic:
    """What this trainer sends: DistributedDataParallel, gradients in fp32, the embedding's last, since it is the head too."""
    model = config.model
    return Traffic("ddp", stored_parameters(model), model.padded_vocab_size * model.n_embd)


def share_of(config: Config, gpus: int) -> Share | None:
    """A GPU's part of a step, with the largest micro batch that fits; None where the step does not divide."""
    train, block_size = config.train, config.model.block_size
    samples, rest = divmod(train.tokens_per_step, block_size * gpus)
    if rest or not samples:
        return None
    micro = max(size for size in range(1, train.micro_batch_size + 1) if samples % size == 0)
    return Share(micro, samples // micro, block_size)


def _base(config: Config, gpu: Gpu, peak: float, fabric: Fabric, chosen: Assumptions, seen: Observed | None) -> Base:
    """The training to scale from: the run of --from, or one node at the rate of a flag or of the GPU's MFU."""
    flops = config.model.flops_per_token
    given = chosen.given("tokens_per_s_per_gpu"), chosen.given("mfu")
    if seen is not None and given == (None, None):
        rate = seen.tokens_per_s_per_gpu.value * seen.config.model.flops_per_token / flops
        scaled = "" if seen.config.model == config.model else f", scaled by FLOPs from {seen.config.model.tag}"
        mfu = f", MFU {seen.mfu.value:.1%}" if seen.mfu else ""
        chosen.note(
            "--tokens-per-s-per-gpu", rate, "tokens/s", MEASURED, f"{seen.tokens_per_s_per_gpu.how}{mfu}{scaled}"
        )
        own = Fabric(seen.gpus_per_node, fabric.link_gbyte_s, fabric.network_gbit_s, fabric.efficiency)
        return Base(rate, seen.gpus, own, _share(seen.config, seen.gpus), traffic_of(config))
    if given[0] is not None:
        rate = chosen.pick("tokens_per_s_per_gpu", "tokens/s", default=0.0, source="")
    else:
        mfu = chosen.pick("mfu", f"of {peak:g} TFLOP/s, on one node", default=gpu.mfu, source=gpu.mfu_source)
        if mfu > 1:
            raise UsageError(f"--mfu={mfu:g} must be 1 or below: it is a share, 0.4 for 40 %")
        rate = mfu * peak * 1e12 / flops
    gpus = fabric.gpus_per_node
    return Base(rate, gpus, fabric, _share(config, gpus), traffic_of(config))


def _share(config: Config, gpus: int) -> Share:
    """Like `share_of`, and for a step that does not divide as near as may be: the base's rate is known anyhow."""
    train, block_size = config.train, config.model.block_size
    fallback = max(1.0, train.tokens_per_step / (train.micro_batch_size * block_size * gpus))
    return share_of(config, gpus) or Share(train.micro_batch_size, fallback, block_size)


def _nodes(text: str | None, chosen: Assumptions) -> tuple[int, ...]:
    """`4`, or `1,2,4,8`."""
    parts = (text or "1").split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UsageError(f"--nodes={text} is not a count or a list of them; write 4, or 1,2,4,8 for a table")
    chosen.note("--nodes", int(parts[-1]), "", FLAG if text else DEFAULT)
    return tuple(int(part) for part in parts)


def _note_settings(config: Config, chosen: Assumptions) -> None:
    model, train, save = config.model, config.train, config.checkpoint
    shape = f"{model.n_layer} × {model.n_embd}, block {model.block_size}, vocabulary {model.padded_vocab_size}"
    chosen.note("model.*", shape, "", SETTINGS)
    chosen.note(
        "train.total_tokens", train.steps * train.tokens_per_step, "tokens", SETTINGS, f"{train.steps:,} whole steps"
    )
    chosen.note("train.tokens_per_step", train.tokens_per_step, "tokens", SETTINGS)
    chosen.note("train.micro_batch_size", train.micro_batch_size, "sequences", SETTINGS)
    chosen.note("train.eval_every, eval_tokens", f"{train.eval_every}, {train.eval_tokens}", "steps, tokens", SETTINGS)
    chosen.note("checkpoint.every_minutes", save.every_minutes, "min", SETTINGS)
    chosen.note("checkpoint.keep_last", save.keep_last, "", SETTINGS)


def _mtbf_s(options: Mapping[str, Any], nodes: int, chosen: Assumptions, seen: Observed | None) -> float:
    """Of the whole job."""
    of_job = options["mtbf_of"] == "job"
    if of_job and options["mtbf_hours"] is None:
        raise UsageError("--mtbf-of=job says what --mtbf-hours is of; give that too")
    hours = chosen.pick(
        "mtbf_hours",
        "h between failures of the job" if of_job else "h between failures of a node",
        measured=seen.mtbf_hours if seen else None,
        default=MTBF_NODE_HOURS,
        source="Llama 3: 419 unexpected interruptions of 16,384 GPUs in 54 days (arXiv:2407.21783, section 3.3.4)",
    )
    return hours * 3600 / (1 if of_job else nodes)


def _data_tokens(options: Mapping[str, Any], config: Config, chosen: Assumptions) -> int:
    tokens = chosen.pick(
        "data_tokens",
        "tokens on disk",
        default=config.train.steps * config.train.tokens_per_step,
        source="as many as the run reads: no token twice",
    )
    return int(tokens)
