"""A plan as a block of text for a proposal: the result, how it is reckoned, and every assumption with its origin."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2hpc import cli
from gpt2hpc.planning import memory
from gpt2hpc.planning.assumptions import Assumption
from gpt2hpc.planning.reckoning import Plan, Row
from gpt2hpc.planning.storage import BESIDE
from gpt2hpc.planning.workings import workings


def render(plan: Plan) -> str:
    """All parts; the scaling table only where several counts of nodes were asked for."""
    parts = [_title(plan), _result(plan)]
    if len(plan.rows) > 1:
        parts.append(_table(plan.rows))
    numbered = [f"  {f'({number})':5} {line}" for number, line in enumerate(workings(plan), start=1)]
    parts.append("\n".join(["How (docs/plan.md has these formulae by number)", *numbered]))
    return "\n\n".join([*parts, _assumptions(plan.inputs.assumptions)])


def _title(plan: Plan) -> str:
    step, fabric = plan.step, plan.inputs.fabric
    machine = (
        f"{cli.plural(plan.row.nodes, 'node')} × {fabric.gpus_per_node} {plan.inputs.gpu.name} = {step.gpus:,} GPUs"
    )
    return f"Plan for {plan.inputs.config.model.tag}: {plan.tokens:,} tokens on {machine}"


def _result(plan: Plan) -> str:
    """What goes into a proposal, each with the number of its formula."""
    step, configured, best, limit = plan.step, plan.configured, plan.best, plan.inputs.time_limit_s
    chained = f"of at most {cli.duration(limit)}, one after another" if limit else "without a time limit"
    restarts = f"failures, {plan.failures:,.2f} expected, restart one of them"
    interval, advice = _minutes(configured.interval_s), f"--checkpoint.every_minutes {_plain(best.interval_s / 60)}"
    waits = (
        f"; EACH WAITS: a save takes {_minutes(plan.inputs.save_s)}"
        if configured.waited_s > plan.losses.stall_s
        else ""
    )
    lines = [
        ("GPU-hours", f"{plan.gpu_hours:,.1f}", f"{plan.wall_s / 3600:,.2f} h × {step.gpus:,} GPUs (12)"),
        ("hours", f"{plan.wall_s / 3600:,.2f}", f"of running jobs, without the queue; {plan.row.remark} (11)"),
        ("jobs", f"{plan.jobs:,}", f"{chained}; {restarts} (10)"),
        ("tokens/s", f"{step.tokens_per_s:,.0f}", f"{step.tokens_per_s_per_gpu:,.0f} a GPU, MFU {plan.mfu:.1%} (6)"),
        ("disk", f"{plan.storage.peak / 1e9:,.1f} GB", f"at most: {_disk(plan)} (13)"),
        ("lost", f"{configured.overhead:.2%}", f"to saves and failures, with a save every {interval}{waits} (9)"),
        ("save every", _minutes(best.interval_s), f"loses least, {best.overhead:.2%}: {advice} (8)"),
        ("GPU memory", f"{plan.memory.total / 1e9:,.1f} GB", _memory(plan)),
    ]
    return "\n".join(["Result", *(f"  {name:11} {value:>12}  {words}" for name, value, words in lines)])


def _memory(plan: Plan) -> str:
    inputs, micro = plan.inputs, plan.step.share.micro_batch
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {memory.remedy(inputs.config, inputs.gpu, plan.step.gpus)}"
    return f"of {inputs.gpu.memory_gb:g} at a micro batch of {micro}: {verdict} (14)"


def _disk(plan: Plan) -> str:
    stored = plan.storage
    checkpoints = f"{stored.checkpoints} + {BESIDE} checkpoints of {stored.checkpoint / 1e9:,.3f}"
    return f"data {stored.data / 1e9:,.2f} in {stored.shards:,} shards, {checkpoints}, logs {stored.logs / 1e9:,.3f}"


def _table(rows: Sequence[Row]) -> str:
    """Efficiency: the rate of a GPU beside that of the base."""
    names = ("nodes", "GPUs", "tokens/s", "a GPU", "efficiency", "step ms", "not hidden ms")
    return "\n".join(["Scaling (6)", f"  {_columns(names)}  remark", *map(_line, rows)])


def _line(row: Row) -> str:
    step = row.step
    values = [f"{row.nodes}", f"{row.gpus:,}", *["-"] * 5]
    if step is not None and row.efficiency is not None:
        rates = [f"{step.tokens_per_s:,.0f}", f"{step.tokens_per_s_per_gpu:,.0f}", f"{row.efficiency:.1%}"]
        values[2:] = [*rates, f"{step.seconds * 1e3:,.1f}", f"{step.exposed_s * 1e3:,.1f}"]
    return f"  {_columns(values)}  {row.remark}"


def _columns(values: Sequence[str]) -> str:
    return " ".join(f"{value:>{width}}" for value, width in zip(values, (5, 6, 13, 9, 10, 10, 13), strict=True))


def _assumptions(assumptions: Sequence[Assumption]) -> str:
    lines = []
    for each in assumptions:
        value = _number(each.value) if isinstance(each.value, int | float) else f"{each.value}"
        number = f"{value} {each.unit}".strip()
        lines.append(f"  {each.name:30} {number:46} {each.origin:9} {each.source}".rstrip())
    return "\n".join(["Assumptions", *lines])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _minutes(seconds: float) -> str:
    return f"{_plain(seconds / 60)} min"


def _plain(minutes: float) -> str:
    """Two digits, or all before the point; never with an exponent, since it is copied into a command."""
    return f"{minutes:.0f}" if minutes >= 10 else f"{max(minutes, 0.001):.2g}"
