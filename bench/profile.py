"""Where the time of a training step goes: `python -m bench.profile [--shape gpt2-124m] [--contender nanoGPT-style] [--way compiled]`.

By torch's profiler, over some steps after those that warm up: what the processor's threads wait for, operator by operator, without what
an operator has called; and of a GPU its kernels, how much of a step it was busy, and so how much passed between them. A profiled step
takes longer than another one, above all where a GPU waits for Python: both times are in the table.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench import report
from bench.train import OTHERS, OURS, REPLAYED, settings, shapes
from bench.trainers import CONTENDERS, Contender, quiet_stdout
from gpt2hpc import cli
from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.dist_env import DistEnv

WARM_UP = 3
LONGEST_NAME = 90


class Span(NamedTuple):
    """When something took place, in nanoseconds."""

    name: str
    begin: int
    end: int


def union(spans: Iterable[Span]) -> int:
    """Nanoseconds in which at least one of them took place."""
    total = until = 0
    for span in sorted(spans, key=lambda each: each.begin):
        total += max(0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return total


def measure(contender: Contender, device: torch.device, steps: int) -> dict[str, Any]:
    def take(numbers: range) -> float:
        began = time.perf_counter()
        losses = [contender.step(number) for number in numbers]
        float(losses[-1])  # waits for the device
        return (time.perf_counter() - began) / len(numbers)

    take(range(WARM_UP))
    free = take(range(WARM_UP, WARM_UP + steps))
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        profiled = take(range(WARM_UP + steps, WARM_UP + 2 * steps))
    operators = [(each.key, each.count, each.self_cpu_time_total / 1e3) for each in found.key_averages()]
    facts = {"step_ms": free * 1e3, "profiled_ms": profiled * 1e3, "operators": shares(operators, steps)}
    if not on_gpu:
        return facts
    assert found.profiler is not None
    kernels = [
        Span(each.name(), each.start_ns(), each.end_ns())
        for each in found.profiler.kineto_results.events()
        if each.device_type() == torch.autograd.DeviceType.CUDA and not each.is_user_annotation()
    ]
    taken: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        taken[kernel.name].append((kernel.end - kernel.begin) / 1e6)
    by_name = [(name, len(each), sum(each)) for name, each in taken.items()]
    return {**facts, "busy_ms": union(kernels) / 1e6 / steps, "kernels": shares(by_name, steps)}


def shares(found: Iterable[tuple[str, int, float]], steps: int) -> list[dict[str, Any]]:
    """Calls and milliseconds a step of each, the longest first; the names of `found` with the calls and milliseconds of all steps."""
    rows = [{"name": name, "calls": calls / steps, "ms": ms / steps} for name, calls, ms in found]
    return sorted(rows, key=lambda row: row["ms"], reverse=True)


def table(facts: dict[str, Any]) -> str:
    rows = cli.plural(facts["rows"], "sequence")
    busy = f" The GPU was busy for {facts['busy_ms']:.1f} ms of them." if "kernels" in facts else ""
    lines = [
        "# A step's time",
        "",
        *report.made(facts),
        f"{facts['contender']}, {facts['shape']}, {facts['way']}, {facts['precision']}, {rows} a micro batch: "
        f"{facts['step_ms']:.1f} ms a step, {facts['profiled_ms']:.1f} ms profiled.{busy}",
    ]
    for title, kind in (("Kernels", "kernels"), ("Operators, where the processor's threads were", "operators")):
        if rows := facts.get(kind):
            whole = sum(row["ms"] for row in rows)
            lines += ["", f"| {title} | calls a step | ms a step | |", "| --- | ---: | ---: | ---: |"]
            lines += [
                f"| `{row['name'][:LONGEST_NAME]}` | {row['calls']:,.0f} | {row['ms']:.2f} | {row['ms'] / whole:.1%} |"
                for row in rows[: facts["top"]]
            ]
            rest = sum(row["ms"] for row in rows[facts["top"] :])
            lines.append(f"| all others | | {rest:.2f} | {rest / whole:.1%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contender", choices=(OURS, REPLAYED, *OTHERS), default=OURS)
    parser.add_argument("--shape", choices=list(shapes()), default="gpt2-124m")
    parser.add_argument("--way", choices=("eager", "compiled"), help="default: eager on a CPU, compiled on a GPU")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--rows", type=int, help="sequences a micro batch, instead of the shape's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--top", type=int, default=20, help="rows of a table (default: 20)")
    parser.add_argument("--name", default="profile", help="of the files in bench/results")
    options = parser.parse_args()
    report.refuse_absent(parser, options.device)
    for name in ("rows", "threads", "steps", "top"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}={value} must be 1 or more")
    on_gpu = options.device == "cuda"
    way = options.way or ("compiled" if on_gpu else "eager")
    if options.contender == REPLAYED and not (on_gpu and way == "compiled"):
        parser.error(f"--contender {REPLAYED!r} wants --device cuda and --way compiled: only that can be replayed")
    precision = options.precision or ("bf16" if on_gpu else "fp32")
    steps = WARM_UP + 2 * options.steps
    config = settings(
        shapes()[options.shape], options.device, way=way, precision=precision, steps=steps, rows=options.rows
    )
    compile_cache.settle(os.environ, DistEnv.from_env({}))
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    with quiet_stdout():
        found = measure(CONTENDERS[options.contender](config, device), device, options.steps)
    facts = {
        **report.facts(options.device),
        "contender": options.contender,
        "shape": options.shape,
        "way": way,
        "precision": precision,
        "rows": config.train.micro_batch_size,
        "top": options.top,
        **found,
    }
    report.write(options.name, facts, table(facts))


if __name__ == "__main__":
    main()
