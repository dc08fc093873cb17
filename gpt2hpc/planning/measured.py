"""What a run has shown of the cluster it ran on, for the plan of another: rates, saves, start-up, failures.

Read from its own files: config.yaml, metrics.jsonl and attempts/. Values are medians, so that a slow step counts no more than another.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2hpc import config_io, durable
from gpt2hpc.cluster.ledger import Attempt, Cause, Ledger
from gpt2hpc.cluster.slurm import expand_nodes
from gpt2hpc.config import Config
from gpt2hpc.errors import DataError, RunDirError
from gpt2hpc.planning.assumptions import Measured
from gpt2hpc.reporting import facts
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.startup import FIRST_STEP

SETTLING_STEPS = 10
"""After a start, in which kernels are compiled and chosen: their rates do not count, unless there are no others."""
ENOUGH_FAILURES = 3
"""Below, the time between them says nothing: after a crash in the first minutes it would be these minutes."""


@dataclass(frozen=True)
class Observed:
    """`gpus` and `nodes` are those of its last attempt; `mfu` is None on a device whose peak is not known.

    `failures` are attempts, of `node_hours` together, that crashed; `mtbf_hours` is of one node, None where too few did. Other
    causes save first. An attempt that left no cause was lost with its node, or preempted without grace, or killed: that is not known.
    """

    name: str
    config: Config
    gpus: int
    nodes: int
    tokens_per_s_per_gpu: Measured
    mfu: Measured | None
    stall_s: Measured | None
    save_s: Measured | None
    start_s: Measured | None
    mtbf_hours: Measured | None
    failures: int
    node_hours: float

    @property
    def gpus_per_node(self) -> int:
        return -(-self.gpus // self.nodes)


def observe(path: Path, *, now: datetime | None = None) -> Observed:
    """All of that; RunDirError where there is no run, DataError where it has logged no step."""
    run = RunDir(path)
    if not run.config.exists():
        raise RunDirError(
            f"--from={path} is not a run directory: it has no config.yaml; give one that `gpt2hpc train` made"
        )
    ledger = Ledger(run)
    attempts, lines = ledger.attempts(), _lines(run.metrics)
    rates = _rates(lines, attempts)
    if not rates or not attempts:
        raise DataError(f"--from={path} has logged no step yet; give a run that has computed some")
    last = attempts[-1]
    count = f"of {len(rates):,} steps of {run.name}"
    per_gpu = statistics.median(line["tokens_per_s"] for line in rates) / last.world_size
    starts = facts.starts(ledger, now=now or datetime.now(UTC))
    node_hours = sum((start.seconds or 0.0) * _nodes(start.attempt) for start in starts) / 3600
    failures = sum(start.attempt.cause == Cause.CRASHED for start in starts)
    return Observed(
        name=run.name,
        config=_settings(run),
        gpus=last.world_size,
        nodes=_nodes(last),
        tokens_per_s_per_gpu=Measured(per_gpu, f"median {count}, {last.world_size} ranks"),
        mfu=_median(rates, "mfu", f"median {count}"),
        stall_s=_median(lines, "save_stall_ms", f"median of the saves of {run.name}", scale=1e-3),
        save_s=_median(lines, "save_s", f"median of the saves of {run.name}"),
        start_s=_start(attempts, lines, run.name),
        mtbf_hours=_between_failures(node_hours, failures, run.name),
        failures=failures,
        node_hours=node_hours,
    )


def _settings(run: RunDir) -> Config:
    """With the micro batch that was found where it is `auto`."""
    config, found = config_io.load(run.config), durable.read_json(run.micro_batch)
    if config.train.micro_batch_size != "auto" or not isinstance(found, dict):
        return config
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, micro_batch_size=found["micro_batch_size"])
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a metrics.jsonl; a torn line is none."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict):
            found.append(parsed)
    return found


def _rates(lines: Sequence[dict[str, Any]], attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Of steps of as many ranks as the last attempt had, past the first of each start where there are such."""
    last = attempts[-1].world_size if attempts else 0
    begins = [(attempt.first_step, attempt.world_size) for attempt in attempts]
    steps = [line for line in lines if isinstance(line.get("tokens_per_s"), float) and "step" in line]
    own = [line for line in steps if _owner(line["step"], begins)[1] == last]
    settled = [line for line in own if line["step"] - _owner(line["step"], begins)[0] > SETTLING_STEPS]
    return settled or own


def _owner(step: int, begins: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First step and ranks of the last attempt that began before that step."""
    return next((begin for begin in reversed(begins) if begin[0] < step), (0, 0))


def _median(lines: Sequence[dict[str, Any]], key: str, how: str, *, scale: float = 1.0) -> Measured | None:
    values = [line[key] * scale for line in lines if isinstance(line.get(key), float)]
    return Measured(statistics.median(values), f"{how} ({len(values)})") if values else None


def _start(attempts: Sequence[Attempt], lines: Sequence[dict[str, Any]], name: str) -> Measured | None:
    """To the begin of its first step: from rank 0's process, where an attempt has noted it, else from its claim by the log."""
    found = []
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=True):
        if attempt.start_up_s is not None:
            found.append(attempt.start_up_s - attempt.start_up.get(FIRST_STEP, 0.0))
            continue
        began, ended = _unix_s(attempt.started), _unix_s(following.started) if following else float("inf")
        logged = [line for line in lines if "ms" in line and began <= line.get("unix_s", 0.0) < ended]
        if logged:
            first = min(logged, key=lambda line: float(line["unix_s"]))
            computing_s = (first["step"] - attempt.first_step) * first["ms"] / 1e3
            found.append(max(0.0, first["unix_s"] - began - computing_s))
    return Measured(statistics.median(found), f"median of {len(found)} starts of {name}") if found else None


def _between_failures(node_hours: float, failures: int, name: str) -> Measured | None:
    if failures < ENOUGH_FAILURES or not node_hours:
        return None
    return Measured(node_hours / failures, f"{failures} crashes in {node_hours:,.1f} node-hours of {name}")


def _nodes(attempt: Attempt) -> int:
    try:
        return max(1, len(expand_nodes(attempt.nodes)))
    except ValueError:
        return 1


def _unix_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
