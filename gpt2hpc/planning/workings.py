"""Every formula of a plan with its numbers in it, so that a reader can check it by hand; docs/plan.md explains them by number."""

from __future__ import annotations

from gpt2hpc.planning.memory import USABLE
from gpt2hpc.planning.reckoning import Plan
from gpt2hpc.planning.scaling import BACKWARD_SHARE
from gpt2hpc.planning.storage import BESIDE


def workings(plan: Plan) -> list[str]:
    """Lines (1) to (14)."""
    return [*_length(plan), *_step(plan), *_intervals(plan), *_time(plan), _disk(plan), _memory(plan)]


def _length(plan: Plan) -> list[str]:
    """(1) and (2): steps, FLOPs, and the rate that the plan scales from."""
    config, base = plan.inputs.config, plan.inputs.base
    model = config.model
    counted = f"6 × {model.parameters:,} + 12 × {model.n_layer} × {model.n_embd} × {model.block_size}"
    return [
        f"{plan.tokens:,} tokens = {plan.steps:,} steps × {config.train.tokens_per_step:,}",
        f"{model.flops_per_token:,} FLOPs a token = 6N + 12·layers·width·block = {counted}; a GPU of {base.gpus} trains "
        f"{base.tokens_per_s_per_gpu:,.0f} tokens/s, and would compute {plan.compute_tokens_per_s_per_gpu:,.0f} alone",
    ]


def _step(plan: Plan) -> list[str]:
    """(3) to (6): a step on the planned GPUs."""
    inputs, step = plan.inputs, plan.step
    share, fabric, traffic = step.share, inputs.fabric, inputs.traffic
    micro_ms = share.micro_batch * share.block_size / plan.compute_tokens_per_s_per_gpu * 1e3
    total_ms, tail_ms = (each(fabric, step.gpus) * 1e3 for each in (traffic.total_s, traffic.tail_s))
    exposed_ms, step_ms = step.exposed_s * 1e3, step.seconds * 1e3
    after = f" + weights {traffic.after_s(fabric, step.gpus) * 1e3:,.2f}" if traffic.weights_sent_after else ""
    network = "" if plan.row.nodes == 1 else f" and {fabric.network_gbit_s:g} Gbit/s / 8"
    return [
        f"{share.accumulation:g} micro batches of {share.micro_batch} × {share.block_size} tokens a GPU, {micro_ms:,.2f} ms each",
        f"all-reduce {total_ms:,.2f} ms = 2·(n−1)/n × {traffic.parameters:,} gradients × {traffic.gradient_bytes} bytes "
        f"/ {fabric.bandwidth(step.gpus) / 1e9:,.1f} GB/s + latency, n = {step.gpus}; that is {fabric.efficiency:g} × the slower of "
        f"{fabric.link_gbyte_s:g} GB/s{network}",
        f"not hidden {exposed_ms:,.2f} ms = max({total_ms:,.2f} − {BACKWARD_SHARE:.3f} × {micro_ms:,.2f}, last bucket "
        f"{tail_ms:,.2f}){after}",
        f"step {step_ms:,.2f} ms = {share.accumulation:g} × {micro_ms:,.2f} + {exposed_ms:,.2f}",
    ]


def _intervals(plan: Plan) -> list[str]:
    """(7) to (9): saves and failures."""
    losses, saved, configured = plan.losses, plan.inputs.save_s, plan.configured
    stalls = f"{configured.waited_s:.3g} s"
    if configured.waited_s > losses.stall_s:
        stalls += f" = {saved:,.1f} s of the save before − {configured.interval_s:,.1f} s"
    return [
        f"Young {losses.young_s():,.1f} s = √(2 × {losses.stall_s:.3g} s × {losses.mtbf_s:,.0f} s)",
        f"Daly {losses.daly_s():,.1f} s; a save takes {saved:,.1f} s, so every {plan.best.interval_s:,.1f} s loses least",
        f"expected time / work {1 + configured.overhead:.5f}, saving every {configured.interval_s:,.1f} s: a save stalls "
        f"{stalls}; a failure, one in {losses.mtbf_s / 3600:,.1f} h, costs about half an interval, {losses.lag_s:,.1f} s "
        f"of a save not yet on disk, and {losses.restart_s:,.0f} s until the next first step",
    ]


def _time(plan: Plan) -> list[str]:
    """(10) to (12): jobs, hours, GPU-hours."""
    inputs = plan.inputs
    jobs = ", without a time limit"
    if inputs.time_limit_s is not None:
        limit = f"{inputs.time_limit_s:,} − {inputs.start_s:,.0f} to start − {plan.reserve_s:,.0f} to stop"
        jobs = f" = {plan.computing_s:,.0f} s / ({limit}) s, rounded up"
    work = f"{plan.steps:,} × {plan.step.seconds:.5f} s + {plan.validations} validations × {plan.validation_s:,.2f} s"
    starts = f"{plan.jobs} × ({inputs.start_s:,.0f} to start + {inputs.save_s:,.1f} to save at the end)"
    return [
        f"jobs {plan.jobs:,}{jobs}",
        f"wall {plan.wall_s:,.0f} s = ({work}) × {1 + plan.configured.overhead:.5f} + {starts}",
        f"GPU-hours {plan.gpu_hours:,.1f} = {plan.wall_s:,.0f} s × {plan.step.gpus:,} / 3600",
    ]


def _disk(plan: Plan) -> str:
    """(13)."""
    inputs, stored = plan.inputs, plan.storage
    return (
        f"disk {stored.peak / 1e9:,.1f} GB = 2 bytes × ({inputs.data_tokens:,} + {inputs.config.train.eval_tokens:,} tokens) + "
        f"{stored.checkpoints + BESIDE} × (12 bytes × {inputs.traffic.parameters:,} parameters + small) + logs"
    )


def _memory(plan: Plan) -> str:
    """(14)."""
    need, usable = plan.memory, USABLE * plan.inputs.gpu.memory_gb
    named = {
        "weights": need.weights,
        "gradients": need.gradients,
        "moments": need.optimizer,
        "weights in 16 bits": need.casts,
        "activations": need.activations,
        "logits and loss": need.head,
    }
    parts = " + ".join(f"{name} {size / 1e9:,.2f}" for name, size in named.items() if size)
    return f"memory {need.total / 1e9:,.2f} GB = {parts}; usable {usable:,.1f} = {USABLE:g} × {plan.inputs.gpu.memory_gb:g}"
