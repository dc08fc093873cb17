"""The plan itself: hours, GPU-hours, jobs, disk and the interval between saves, from the inputs alone.

Numbers in parentheses are those of the formulae in docs/plan.md, which the printed plan refers to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt2hpc.errors import UsageError
from gpt2hpc.planning import memory, scaling
from gpt2hpc.planning.assumptions import DEFAULT, FLAG, MEASURED
from gpt2hpc.planning.inputs import Inputs, share_of
from gpt2hpc.planning.intervals import Losses
from gpt2hpc.planning.scaling import Step
from gpt2hpc.planning.storage import Storage, storage
from gpt2hpc.training.footprint import Footprint

HELD_AGAINST_GPUS = 128
"""The largest count of GPUs among the published figures that the model was held against."""
MOST_OVERHEAD = 10.0
"""Lost to saves and failures, as a share of the work. Above, an error of the inputs is multiplied, and nobody begins such a run."""
AS = {FLAG: "as given", MEASURED: "as measured", DEFAULT: "as assumed"}
"""What is said of the rate that others are modelled from, by its origin."""


@dataclass(frozen=True)
class Row:
    """A count of nodes in the scaling table; `step` is None where it cannot be, `remark` says why, or what is extrapolated."""

    nodes: int
    gpus: int
    step: Step | None
    efficiency: float | None
    remark: str


@dataclass(frozen=True)
class Saving:
    """An interval between saves and what it costs: of the wall time of the computing, in expectation.

    `waited_s` is how long the steps wait for each.
    """

    interval_s: float
    waited_s: float
    overhead: float
    expected_s: float


@dataclass(frozen=True)
class Plan:
    """What a run will take. Times in seconds; `wall_s` is of all its jobs, without the queue.

    `work_s` is steps and validations, `computing_s` those with saves and failures, `usable_s` what a job has for that.
    """

    inputs: Inputs
    rows: tuple[Row, ...]
    row: Row
    step: Step
    compute_tokens_per_s_per_gpu: float
    steps: int
    validations: int
    validation_s: float
    work_s: float
    losses: Losses
    configured: Saving
    best: Saving
    failures: float
    reserve_s: float
    usable_s: float | None
    jobs: int
    computing_s: float
    wall_s: float
    storage: Storage
    memory: Footprint

    @property
    def fits(self) -> bool:
        """Whether a step fits into the memory of a GPU."""
        return self.memory.total <= memory.usable_bytes(self.inputs.gpu)

    @property
    def gpu_hours(self) -> float:
        return self.wall_s * self.step.gpus / 3600

    @property
    def tokens(self) -> int:
        return self.steps * self.inputs.config.train.tokens_per_step

    @property
    def mfu(self) -> float:
        """Of the steps on the planned GPUs."""
        flops = self.step.tokens_per_s_per_gpu * self.inputs.config.model.flops_per_token
        return flops / (self.inputs.peak_tflops * 1e12)


def reckon(inputs: Inputs) -> Plan:
    """The plan; UsageError where the last count of nodes cannot be, or the time limit leaves nothing."""
    config = inputs.config
    base = inputs.base
    rate = scaling.compute_rate(
        base.fabric, base.traffic, base.share, gpus=base.gpus, tokens_per_s_per_gpu=base.tokens_per_s_per_gpu
    )
    rows = tuple(_row(inputs, nodes, rate) for nodes in inputs.nodes)
    row = rows[-1]
    if row.step is None:
        per_node = next(each for each in inputs.assumptions if each.name == "--gpus-per-node")
        whence = ", ".join(filter(None, (per_node.origin, per_node.source)))
        raise UsageError(
            f"--nodes={row.nodes}: {row.remark}, or other --gpus-per-node than {per_node.value} ({whence})"
        )
    step, steps = row.step, config.train.steps
    validations, validation_s = _validations(inputs, rate, step.gpus)
    work_s = steps * step.seconds + validations * validation_s
    losses = Losses(
        stall_s=inputs.stall_s,
        lag_s=inputs.save_s - inputs.stall_s,
        restart_s=inputs.start_s + inputs.requeue_s,
        mtbf_s=inputs.mtbf_s,
    )
    interval_s, save_steps = _interval(inputs, step)
    configured = _saving(losses, work_s, interval_s)
    best = _saving(losses, work_s, max(losses.best_s(), step.seconds))
    reserve_s = 3 * step.seconds + validation_s + 1.5 * inputs.save_s + config.checkpoint.stop_margin_s
    usable_s = _usable_s(inputs, reserve_s)
    computing_s = configured.expected_s
    if configured.overhead > MOST_OVERHEAD:
        raise UsageError(_too_lossy(inputs, configured, best))
    jobs = 1 if usable_s is None else math.ceil(computing_s / usable_s)
    return Plan(
        inputs=inputs,
        rows=rows,
        row=row,
        step=step,
        compute_tokens_per_s_per_gpu=rate,
        steps=steps,
        validations=validations,
        validation_s=validation_s,
        work_s=work_s,
        losses=losses,
        configured=configured,
        best=best,
        failures=computing_s / inputs.mtbf_s,
        reserve_s=reserve_s,
        usable_s=usable_s,
        jobs=jobs,
        computing_s=computing_s,
        wall_s=computing_s + jobs * (inputs.start_s + inputs.save_s),
        storage=storage(config, data_tokens=inputs.data_tokens, ranks=step.gpus, save_steps=save_steps),
        memory=memory.needed(config, gpus=step.gpus, micro_batch=step.share.micro_batch),
    )


def _row(inputs: Inputs, nodes: int, rate: float) -> Row:
    """One line of the scaling table."""
    config, gpus = inputs.config, nodes * inputs.fabric.gpus_per_node
    share = share_of(config, gpus)
    if share is None:
        tokens, block_size = config.train.tokens_per_step, config.model.block_size
        unit = block_size * gpus
        near = max(1, round(tokens / unit)) * unit
        why = f"train.tokens_per_step={tokens} is not a multiple of {block_size} × {gpus} GPUs; try --train.tokens_per_step {near}"
        return Row(nodes, gpus, None, None, why)
    step = scaling.step(inputs.fabric, inputs.traffic, share, gpus=gpus, compute_tokens_per_s=rate)
    efficiency = step.tokens_per_s_per_gpu / inputs.base.tokens_per_s_per_gpu
    remarks = [] if gpus == inputs.base.gpus else ["modelled"]
    if share.micro_batch < inputs.base.share.micro_batch:
        remarks.append(
            f"extrapolated: micro batch {share.micro_batch} instead of {inputs.base.share.micro_batch} computes slower"
        )
    if gpus > HELD_AGAINST_GPUS:
        remarks.append(f"extrapolated: beyond {HELD_AGAINST_GPUS} GPUs")
    return Row(nodes, gpus, step, efficiency, "; ".join(remarks) or AS[inputs.base.origin])


def _validations(inputs: Inputs, rate: float, gpus: int) -> tuple[int, float]:
    """How many, and how long one takes: a forward pass is a third of a step's FLOPs. One at the start and one at the end too."""
    train = inputs.config.train
    count = 1 + -(-train.steps // train.eval_every)
    return count, train.eval_tokens / (3 * rate * gpus)


def _interval(inputs: Inputs, step: Step) -> tuple[float, int | None]:
    """Between saves as the settings have it, in seconds and in steps; whichever comes first. No steps where time decides."""
    saves = inputs.config.checkpoint
    by_time, every = 60 * saves.every_minutes, saves.every_steps
    if every is None or by_time < every * step.seconds:
        return by_time, None
    return every * step.seconds, every


def _saving(losses: Losses, work_s: float, interval_s: float) -> Saving:
    return Saving(
        interval_s, losses.waited_s(interval_s), losses.overhead(interval_s), losses.expected_s(work_s, interval_s)
    )


def _too_lossy(inputs: Inputs, configured: Saving, best: Saving) -> str:
    """Why a run loses more than `MOST_OVERHEAD`, and the mend: it saves too seldom, or too often."""
    lost = f"lose over {MOST_OVERHEAD:g} times its work"
    if configured.interval_s < best.interval_s:
        return (
            f"--checkpoint.every_steps, --checkpoint.every_minutes: a save every {configured.interval_s:,.3g} s, which takes "
            f"{inputs.save_s:,.0f} s, makes a run {lost}; save every {best.interval_s:,.0f} s"
        )
    return (
        f"--mtbf-hours: a failure every {inputs.mtbf_s:,.0f} s makes a run that saves every {configured.interval_s:,.0f} s {lost}; "
        "save more often (--checkpoint.every_minutes), use fewer nodes, or give another"
    )


def _usable_s(inputs: Inputs, reserve_s: float) -> float | None:
    """Of a job's time limit: without its start, and what it keeps back to save and stop."""
    if inputs.time_limit_s is None:
        return None
    usable_s = inputs.time_limit_s - inputs.start_s - reserve_s
    if usable_s <= 0:
        raise UsageError(
            f"--time is {inputs.time_limit_s} s, of which a start takes {inputs.start_s:,.0f} s and the stop {reserve_s:,.0f} s; "
            "nothing is left to compute in, so raise it"
        )
    return usable_s
