"""What a plan is asked: settings, machine and rates, each from a flag, the site's profile, a run's own numbers or a default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt2hpc.cluster import slurm
from gpt2hpc.cluster.choices import Choices
from gpt2hpc.config import Config
from gpt2hpc.errors import UsageError
from gpt2hpc.planning import hardware, memory
from gpt2hpc.planning.assumptions import DEFAULT, FLAG, MEASURED, SETTINGS, SITE, Assumption, Assumptions
from gpt2hpc.planning.hardware import Gpu
from gpt2hpc.planning.measured import Observed
from gpt2hpc.planning.scaling import Fabric, Share, Traffic
from gpt2hpc.planning.storage import OTHER_TENSORS, TENSORS_A_BLOCK, checkpoint_bytes, stored_parameters

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
    """A training on so many GPUs whose rate is known: what the model scales from; `origin` is the rate's."""

    tokens_per_s_per_gpu: float
    gpus: int
    fabric: Fabric
    share: Share
    traffic: Traffic
    origin: str


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
    per_node, time_limit_s = _of_the_site(options, env, gpu, chosen, seen)
    found, config = config.train.micro_batch_size == "auto", memory.settled(config, gpu, nodes[-1] * per_node)
    _note_settings(config, chosen, found=found)
    fabric = _fabric(gpu, per_node, chosen)
    peak = chosen.pick("peak_tflops", "TFLOP/s", default=gpu.peak_tflops, source="data sheet, dense bf16 (V100: fp16)")
    base = _base(config, gpu, peak, fabric, chosen, seen)
    stall_s, save_s = _saves(config, nodes[-1] * per_node, chosen, seen)
    start_s, requeue_s = _restarts(chosen, seen)
    return Inputs(
        config=config,
        gpu=gpu,
        peak_tflops=peak,
        nodes=nodes,
        fabric=fabric,
        base=base,
        traffic=traffic_of(config),
        stall_s=stall_s,
        save_s=max(save_s, stall_s),
        start_s=start_s,
        requeue_s=requeue_s,
        mtbf_s=_mtbf_s(options, nodes[-1], chosen, seen),
        time_limit_s=time_limit_s,
        data_tokens=_data_tokens(config, chosen),
        assumptions=tuple(chosen.all),
    )


def traffic_of(config: Config) -> Traffic:
    """What this trainer sends: DistributedDataParallel, the embedding's gradient last, since it is the head too; with a sharded
    optimizer each parameter from its owner after the step."""
    model, sent_bytes = config.model, 2 if config.train.reduce_dtype == "bf16" else 4
    sent_after = TENSORS_A_BLOCK * model.n_layer + OTHER_TENSORS if config.train.shard_optimizer else 0
    return Traffic(
        "ddp",
        stored_parameters(model),
        model.padded_vocab_size * model.n_embd,
        gradient_bytes=sent_bytes,
        weights_sent_after=sent_after,
    )


def computed_flops_per_token(config: Config) -> int:
    """With what is computed twice."""
    again = config.model.recomputed_flops_per_token if config.train.activation_checkpointing else 0
    return config.model.flops_per_token + again


def share_of(config: Config, gpus: int) -> Share | None:
    """A GPU's part of a step, with the largest micro batch that fits; None where the step does not divide."""
    train, block_size = config.train, config.model.block_size
    samples, rest = divmod(train.tokens_per_step, block_size * gpus)
    if rest or not samples:
        return None
    micro = max(size for size in range(1, train.rows + 1) if samples % size == 0)
    return Share(micro, samples // micro, block_size)


def _of_the_site(
    options: Mapping[str, Any], env: Mapping[str, str], gpu: Gpu, chosen: Assumptions, seen: Observed | None
) -> tuple[int, int | None]:
    """GPUs of a node, and seconds of a job's time limit, if there is one."""
    site = Choices(options, env)
    limit = site.of("time")
    per_node = int(site.of("gpus_per_node", default=seen.gpus_per_node if seen else gpu.per_node))
    if per_node < 1:
        raise UsageError(f"--gpus-per-node={per_node} must be 1 or more")
    _, origin = site.origins["gpus-per-node"]
    if origin == DEFAULT and seen is not None:
        origin = MEASURED
    usual = f"as in {seen.name}" if origin == MEASURED and seen else gpu.node
    chosen.note("--gpus-per-node", per_node, "", origin, "" if origin in (FLAG, SITE) else usual)
    value, origin = site.origins.get("time", ("no limit", DEFAULT))
    chosen.note("--time", value, "", origin, "neither a flag nor the site has one" if limit is None else "")
    return per_node, None if limit is None else 60 * slurm.minutes(str(limit))


def _fabric(gpu: Gpu, per_node: int, chosen: Assumptions) -> Fabric:
    part = "" if per_node == gpu.per_node else f"for {per_node} of {gpu.per_node} GPUs of a "
    if per_node > gpu.per_node:
        part = f"no more for {per_node} GPUs than for the {gpu.per_node} of a "
    return Fabric(
        per_node,
        chosen.pick("link_gbyte_s", "GB/s a GPU", default=gpu.link_gbyte_s, source=gpu.node),
        chosen.pick("network_gbit_s", "Gbit/s a node", default=gpu.network_of(per_node), source=f"{part}{gpu.node}"),
        chosen.pick(
            "efficiency", "of those rates", default=hardware.BUS_EFFICIENCY, source="docs/plan.md, measured all-reduces"
        ),
    )


def _base(config: Config, gpu: Gpu, peak: float, fabric: Fabric, chosen: Assumptions, seen: Observed | None) -> Base:
    """The training to scale from: the run of --from, or one node at the rate of a flag or of the GPU's MFU."""
    if seen is not None and not chosen.has("tokens_per_s_per_gpu") and not chosen.has("mfu"):
        return _base_as_seen(config, gpu, fabric, chosen, seen)
    if chosen.has("tokens_per_s_per_gpu"):
        rate, origin = chosen.pick("tokens_per_s_per_gpu", "tokens/s, on one node", default=0.0, source=""), FLAG
    else:
        origin = FLAG if chosen.has("mfu") else DEFAULT
        mfu = chosen.pick("mfu", f"of {peak:g} TFLOP/s, on one node", default=gpu.mfu, source=gpu.mfu_source)
        if mfu > 1:
            raise UsageError(f"--mfu={mfu:g} must be 1 or below: it is a share, 0.4 for 40 %")
        counted = config.model.flops_per_token if chosen.has("mfu") else computed_flops_per_token(config)
        rate = mfu * peak * 1e12 / counted
    gpus = fabric.gpus_per_node
    return Base(rate, gpus, fabric, _share(config, gpus), traffic_of(config), origin)


def _base_as_seen(config: Config, gpu: Gpu, fabric: Fabric, chosen: Assumptions, seen: Observed) -> Base:
    """The run's rate, by FLOPs where it was of another size, or computed its blocks once instead of twice."""
    ratio, scaled = computed_flops_per_token(seen.config) / computed_flops_per_token(config), ""
    if ratio != 1:
        scaled = f", scaled by FLOPs from {seen.config.model.tag}"
    rate = seen.tokens_per_s_per_gpu.value * ratio
    mfu = f", MFU {seen.mfu.value:.1%}" if seen.mfu else ""
    how = f"{seen.tokens_per_s_per_gpu.how}{mfu}{scaled}"
    chosen.note("--tokens-per-s-per-gpu", rate, "tokens/s", MEASURED, how)
    network = fabric.network_gbit_s if chosen.has("network_gbit_s") else gpu.network_of(seen.gpus_per_node)
    own = dataclasses.replace(fabric, gpus_per_node=seen.gpus_per_node, network_gbit_s=network)
    theirs = memory.settled(seen.config, gpu, seen.gpus)
    return Base(rate, seen.gpus, own, _share(theirs, seen.gpus), traffic_of(config), MEASURED)


def _saves(config: Config, ranks: int, chosen: Assumptions, seen: Observed | None) -> tuple[float, float]:
    """The stall of a save, and the seconds until it is on disk; a run of another size says nothing of either."""
    size = checkpoint_bytes(config, ranks=ranks)
    alike = seen if seen and seen.config.model == config.model else None
    copied = f"{size / ranks / 1e6:,.1f} MB a rank at {COPY_BYTES_PER_S / 1e9:g} GB/s"
    written = f"{size / 1e9:,.2f} GB at {WRITE_BYTES_PER_S / 1e6:g} MB/s"
    return (
        chosen.pick(
            "stall_s",
            "s a save",
            measured=alike.stall_s if alike else None,
            default=size / ranks / COPY_BYTES_PER_S,
            source=f"{copied}, bench/results/checkpoint.md",
        ),
        chosen.pick(
            "save_s",
            "s until on disk",
            measured=alike.save_s if alike else None,
            default=size / WRITE_BYTES_PER_S,
            source=f"{written}, bench/results/checkpoint.md",
        ),
    )


def _restarts(chosen: Assumptions, seen: Observed | None) -> tuple[float, float]:
    """Seconds of a start, and from a failure until then."""
    began = seen.start_s if seen else None
    idle = "Slurm's own delay on idle nodes; the queue comes on top"
    return (
        chosen.pick("start_s", "s a start", measured=began, default=START_S, source="assumed; measure it"),
        chosen.pick("requeue_s", "s until a job runs again", default=REQUEUE_S, source=idle),
    )


def _share(config: Config, gpus: int) -> Share:
    """Like `share_of`, and for a step that does not divide as near as may be: the base's rate is known anyhow."""
    train, block_size = config.train, config.model.block_size
    fallback = max(1.0, train.tokens_per_step / (train.rows * block_size * gpus))
    return share_of(config, gpus) or Share(train.rows, fallback, block_size)


def _nodes(text: str | None, chosen: Assumptions) -> tuple[int, ...]:
    """`4`, or `1,2,4,8`."""
    parts = (text or "1").split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UsageError(f"--nodes={text} is not a count or a list of them; write 4, or 1,2,4,8 for a table")
    chosen.note("--nodes", int(parts[-1]), "", FLAG if text else DEFAULT)
    return tuple(int(part) for part in parts)


def _note_settings(config: Config, chosen: Assumptions, *, found: bool) -> None:
    model, train, save = config.model, config.train, config.checkpoint
    shape = f"{model.n_layer} × {model.n_embd}, block {model.block_size}, vocabulary {model.padded_vocab_size}"
    chosen.note("model.*", shape, "", SETTINGS)
    chosen.note(
        "train.total_tokens", train.steps * train.tokens_per_step, "tokens", SETTINGS, f"{train.steps:,} whole steps"
    )
    chosen.note("train.tokens_per_step", train.tokens_per_step, "tokens", SETTINGS)
    auto = "auto: the most of which a step fits (14)" if found else ""
    chosen.note("train.micro_batch_size", train.micro_batch_size, "sequences", SETTINGS, auto)
    for name in ("activation_checkpointing", "shard_optimizer"):
        if getattr(train, name):
            chosen.note(f"train.{name}", "true", "", SETTINGS)
    chosen.note("train.eval_every, eval_tokens", f"{train.eval_every}, {train.eval_tokens}", "steps, tokens", SETTINGS)
    chosen.note("checkpoint.every_minutes", save.every_minutes, "min", SETTINGS)
    chosen.note("checkpoint.keep_last", save.keep_last, "", SETTINGS)


def _mtbf_s(options: Mapping[str, Any], nodes: int, chosen: Assumptions, seen: Observed | None) -> float:
    """Of the whole job."""
    of_job = options["mtbf_of"] == "job"
    if of_job and options["mtbf_hours"] is None:
        raise UsageError("--mtbf-of=job says what --mtbf-hours is of; give that too")
    source = "Llama 3: 419 unexpected interruptions of 16,384 GPUs in 54 days (arXiv:2407.21783, section 3.3.4)"
    if seen is not None and seen.failures and seen.mtbf_hours is None:
        crashes = "1 crash" if seen.failures == 1 else f"{seen.failures} crashes"
        source += f"; {crashes} in {seen.node_hours:,.1f} node-hours of {seen.name} are too few to tell"
    hours = chosen.pick(
        "mtbf_hours",
        "h between failures of the job" if of_job else "h between failures of a node",
        measured=seen.mtbf_hours if seen else None,
        default=MTBF_NODE_HOURS,
        source=source,
    )
    return hours * 3600 / (1 if of_job else nodes)


def _data_tokens(config: Config, chosen: Assumptions) -> int:
    tokens = chosen.pick(
        "data_tokens",
        "tokens on disk",
        default=config.train.steps * config.train.tokens_per_step,
        source="as many as the run reads: no token twice",
    )
    return int(tokens)
