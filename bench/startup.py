"""How long a training takes from its process to the end of its first step, by phase: `python -m bench.startup [--rounds 3]`.

Each start is a real `gpt2hpc train` of one rank: GPT-2 of a preset's shape with a short context, on random tokens. A round has

    new, eager             a new run, nothing compiled
    resumed, eager         the same run goes on from its checkpoint
    new, cold              a new run, compiled, with an empty directory for what is compiled
    new, warm              another new run, which finds what the one before has compiled
    resumed, warm          that one goes on

on the CPU, and on the GPU where there is one. The phases are those that the run itself has noted (docs/slurm.md, Start-up). Files that
are read (Python's, torch's, the checkpoint) are in the memory of the machine: a first start of the day is slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from gpt2hpc import config_io
from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.data import manifest, shards
from gpt2hpc.run_dir import RunDir

VOCABULARY = 50257
BLOCK_SIZE = 64
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def write_data(directory: Path) -> None:
    """Random tokens: enough for a few steps and a validation."""
    directory.mkdir()
    source = np.random.default_rng(0)
    written = [
        shards.write_shard(
            directory, split=split, unit=unit, documents=[source.integers(0, VOCABULARY, size=100_000, dtype=np.uint16)]
        )
        for unit, split in enumerate(("val", "train"))
    ]
    manifest.publish(directory, written, vocab_size=VOCABULARY, plan={})


def start(
    run: RunDir, data: Path, cache: Path, *, preset: str, device: str, compiled: bool, steps: int
) -> dict[str, Any]:
    """One start of a training that ends after so many steps; its phases in seconds, and how it found the cache."""
    settings = {
        "data.dir": data,
        "model.block_size": BLOCK_SIZE,
        "train.device": device,
        "train.compile": str(compiled).lower(),
        "train.micro_batch_size": 1,
        "train.tokens_per_step": BLOCK_SIZE,
        "train.total_steps": steps,
        "train.eval_tokens": 4 * BLOCK_SIZE,
        "train.preflight": "full",
        "optimizer.warmup_tokens": 0,
        "checkpoint.keep_last": 2,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    words = ["-m", "gpt2hpc.train", "--preset", preset, "--run-dir", str(run.path), "--nproc", "1", *flags]
    environment = {name: value for name, value in os.environ.items() if name not in compile_cache.FOLDERS}
    environment[compile_cache.PLACE] = str(cache)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
    attempt = Ledger(run).attempts()[-1]
    return {"phases": dict(attempt.start_up), "cache": attempt.compile_cache}


STARTS = (
    ("new, eager", False, 1, "eager"),
    ("resumed, eager", False, 2, "eager"),
    ("new, cold", True, 1, "cold"),
    ("new, warm", True, 1, "warm"),
    ("resumed, warm", True, 2, "warm"),
)
"""Name, whether it is compiled, steps until its end, and its directory."""


def a_round(preset: str, device: str, folder: Path, *, eager: bool) -> dict[str, dict[str, Any]]:
    data, found = folder / "data", {}
    write_data(data)
    for name, compiled, steps, runs in STARTS:
        if not (compiled or eager):
            continue
        run, cache = RunDir(folder / runs), folder / "cache"
        found[name] = start(run, data, cache, preset=preset, device=device, compiled=compiled, steps=steps)
        print(f"{DEVICES[device]}, {name}: {sum(found[name]['phases'].values()):.1f} s", flush=True)
        if name.startswith("resumed") or name == "new, cold":
            subprocess.run(["rm", "-rf", str(run.path)], check=True)
    return found


def devices() -> list[str]:
    import torch

    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def medians(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each kind of start: the median of each phase, and of the sum; how the cache was found, if it was the same each time."""
    middle: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        each = [found[name] for found in rounds]
        phases = {key: statistics.median(one["phases"][key] for one in each) for key in each[0]["phases"]}
        total = statistics.median(sum(one["phases"].values()) for one in each)
        middle[name] = {"phases": phases, "total": total, "cache": " or ".join({str(one["cache"]) for one in each})}
    return middle


def table(facts: dict[str, Any]) -> str:
    rounds = facts["rounds"]
    of = (
        f"medians of {rounds} rounds, so that the phases of a column need not add up to its sum"
        if rounds > 1
        else "one round"
    )
    parts = [
        "# Starting",
        "",
        f"Seconds from the start of a rank's process to the end of its first step: {facts['preset']} with a context of {BLOCK_SIZE}, "
        f"one rank, local disk; {of}.",
        *report.made(facts)[:1],
    ]
    for device, middle in facts["devices"].items():
        phases = dict.fromkeys(phase for each in middle.values() for phase in each["phases"])
        parts += ["", f"| {DEVICES[device]} | {' | '.join(middle)} |", "| --- |" + " ---: |" * len(middle)]
        for phase in phases:
            parts.append(
                f"| {phase} | " + " | ".join(f"{each['phases'][phase]:.1f}" for each in middle.values()) + " |"
            )
        parts.append("| **all** | " + " | ".join(f"**{each['total']:.1f}**" for each in middle.values()) + " |")
        parts.append(
            "| compile cache | " + " | ".join(each["cache"].replace("None", "-") for each in middle.values()) + " |"
        )
    return "\n".join([*parts, "", "The phases are told of in [docs/slurm.md](../../docs/slurm.md#start-up).", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=list(config_io.presets()), default="gpt2-124m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=list(DEVICES), help="default: the CPU, and the GPU where there is one")
    parser.add_argument("--compiled-only", action="store_true", help="without the eager starts")
    parser.add_argument("--name", default="startup", help="of the files in bench/results")
    arguments = parser.parse_args()
    report.refuse_absent(parser, arguments.device or "cpu")
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds} must be 1 or more")
    chosen = [arguments.device] if arguments.device else devices()
    found: dict[str, list[dict[str, dict[str, Any]]]] = {device: [] for device in chosen}
    for _ in range(arguments.rounds):
        for device, rounds in found.items():
            with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
                rounds.append(a_round(arguments.preset, device, Path(folder), eager=not arguments.compiled_only))
    facts = {
        **report.facts("cuda" if "cuda" in found else "cpu", ["torch"]),
        "preset": arguments.preset,
        "rounds": arguments.rounds,
        "devices": {device: medians(rounds) for device, rounds in found.items()},
        "all": found,
    }
    report.write(arguments.name, facts, table(facts))


if __name__ == "__main__":
    main()
