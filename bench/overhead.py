"""What a training spends beside its steps: `python -m bench.overhead [--shape gpt2-124m] [--steps 60]`.

A real training on this machine, in this process, that logs every step and saves every quarter of it. Told are the share of the steps'
time that waits for data, that logging takes, and that a save takes of the default interval between saves: while the steps wait
for it, and by what steps are slower while it is written beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import report
from bench.loader import write_shards
from bench.train import settings, shapes
from gpt2hpc import cli
from gpt2hpc.cluster.signals import SignalFlag
from gpt2hpc.config import CheckpointConfig, Config, DataConfig
from gpt2hpc.jobs import Train
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.progress import Progress
from gpt2hpc.training.saves import Saves
from gpt2hpc.training.trainer import Trainer

BOUNDS = {"waiting for data": 0.005, "logging": 0.005, "saving": 0.01}


@dataclasses.dataclass
class Clocks:
    """Seconds of each call of something, and of each step whether a save was under way."""

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    steps: list[tuple[float, bool]] = dataclasses.field(default_factory=list)

    def timed(self, name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        found = self.seconds.setdefault(name, [])

        def call(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return genuine(*arguments, **more)
            finally:
                found.append(time.perf_counter() - began)

        return call

    def stepped(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(trainer: Trainer, *arguments: Any) -> Any:
            saving, began = trainer.saves.is_under_way, time.perf_counter()
            result = genuine(trainer, *arguments)
            if trainer.ranks.device.type == "cuda":
                torch.cuda.synchronize()
            self.steps.append((time.perf_counter() - began, saving))
            return result

        return call


@contextmanager
def clocked() -> Iterator[Clocks]:
    clocks = Clocks()
    with (
        mock.patch.object(Progress, "add", clocks.timed("logging", Progress.add)),
        mock.patch.object(Saves, "begin", clocks.timed("stall", Saves.begin)),
        mock.patch.object(Trainer, "optimizer_step", clocks.stepped(Trainer.optimizer_step)),
    ):
        yield clocks


def measure(config: Config, folder: Path) -> dict[str, Any]:
    run = RunDir(folder / "run")
    with clocked() as clocks:
        Train(str(run.path), config)(SignalFlag())
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    waited = [each["data_wait_ms"] / 1e3 for each in records if "data_wait_ms" in each]
    _, *steps = clocks.steps  # the first warms up
    free = statistics.median(seconds for seconds, saving in steps if not saving)
    slower = sum(seconds - free for seconds, saving in steps if saving)
    saves = len(clocks.seconds["stall"])
    interval_s = CheckpointConfig().every_minutes * 60
    stall = statistics.median(clocks.seconds["stall"])
    return {
        "step_s": free,
        "saves": saves,
        "stall_s": stall,
        "slower_s": slower / saves,
        "shares": {
            "waiting for data": statistics.mean(waited[1:]) / free,
            "logging": statistics.mean(clocks.seconds["logging"][1:]) / free,
            "saving": (stall + max(0.0, slower / saves)) / interval_s,
        },
    }


def table(facts: dict[str, Any]) -> str:
    rows = [f"| {name} | {facts['shares'][name]:.3%} | {bound:.1%} |" for name, bound in BOUNDS.items()]
    threads = "" if "gpu" in facts["machine"] else f", {cli.plural(facts['threads'], 'thread')}"
    return "\n".join(
        [
            "# Beside the steps",
            "",
            *report.made(facts),
            f"{facts['shape']}, {facts['steps']} steps of {facts['step_s'] * 1e3:,.0f} ms{threads}, all in the log; "
            f"{facts['saves']} saves.",
            f"The steps wait {facts['stall_s'] * 1e3:,.0f} ms for a save, and are {facts['slower_s'] * 1e3:,.0f} ms slower in all",
            "while it is written; its share is one of the 15 minutes between saves.",
            "",
            "| | share of the time | should be below |",
            "| --- | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(shapes()), default="gpt2-124m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="overhead", help="of the files in bench/results")
    options = parser.parse_args()
    report.refuse_absent(parser, options.device)
    if options.steps < 8:
        parser.error(f"--steps={options.steps} must be 8 or more: a quarter of them passes between saves")
    torch.set_num_threads(options.threads)
    way, precision = ("compiled", "bf16") if options.device == "cuda" else ("eager", "fp32")
    plain = settings(shapes()[options.shape], options.device, way=way, precision=precision, steps=options.steps)
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_shards(folder / "data", 10_000_000)
        config = dataclasses.replace(
            plain,
            data=DataConfig(dir=str(folder / "data")),
            train=dataclasses.replace(
                plain.train, log_every=1, eval_every=options.steps, eval_tokens=plain.model.block_size, preflight="off"
            ),
            checkpoint=dataclasses.replace(plain.checkpoint, every_steps=options.steps // 4, keep_last=2),
        )
        found = measure(config, folder)
    facts = {
        **report.facts(options.device),
        "shape": options.shape,
        "steps": options.steps,
        "threads": options.threads,
        **found,
    }
    report.write(options.name, facts, table(facts))


if __name__ == "__main__":
    main()
