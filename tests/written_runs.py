"""Run directories written by hand, for tests of what reads them: no training, any history."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2hpc import config_io, durable
from gpt2hpc.cluster.ledger import Attempt
from gpt2hpc.config import Config
from gpt2hpc.run_dir import RunDir


def attempt(number: int, **facts: Any) -> Attempt:
    """Attempt `number` of one job on gpu01 and gpu02, an hour after the one before, for half an hour."""
    given: dict[str, Any] = {
        "job": "4711",
        "restart": number - 1,
        "host": "gpu01",
        "pid": 1,
        "started": f"2026-01-31T{number:02d}:00:00Z",
        "process": "elsewhere",
        "nodes": "gpu[01-02]",
        "world_size": 8,
        "ended": f"2026-01-31T{number:02d}:30:00Z",
        **facts,
    }
    return Attempt(number=number, **given)


def write(
    path: Path, attempts: Sequence[Attempt], *, steps: int = 200, config: Config | None = None, **values: Any
) -> RunDir:
    """A run with metrics of every step; `values` are added to each."""
    run = RunDir(path)
    run.create()
    config_io.store(config or Config(), run.config)
    with run.metrics.open("w") as file:
        for step in range(steps + 1):
            loss = 3 + 8 * math.exp(-step / 40)
            if step % 20 == 0:
                file.write(json.dumps({"step": step, "val_loss": loss, "val_tokens": 1}) + "\n")
            if step:
                facts = {
                    "lr": 1e-3 * (1 - step / steps / 2),
                    "grad_norm": 1 / step,
                    "tokens_per_s": 1000.0 + step,
                    **values,
                }
                file.write(json.dumps({"step": step, "loss": loss, "ms": 1.0, **facts}) + "\n")
    for each in attempts:
        durable.publish_json(run.attempt(each.number), dataclasses.asdict(each))
    return run
