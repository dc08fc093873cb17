"""The smallest data and model that show what a test is about, and real runs of it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2hpc import config_io, starting
from gpt2hpc.cluster.launch import LocalJob, SignalRelay, run_attempt
from gpt2hpc.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RequeueConfig,
    TrainConfig,
)
from gpt2hpc.data import manifest, shards
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.checkpoint import METRICS, Checkpoint, newest_valid

VOCAB = 256
RANK_PROGRAM = Path(__file__).parent / "distributed" / "rank.py"


def make_data(directory: Path, *, shard_tokens: Sequence[int] = (5000, 3000, 4100), seed: int = 0) -> Manifest:
    """Random tokens below VOCAB in several training shards and one of validation."""
    directory.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(seed)
    written = [
        shards.write_shard(
            directory,
            split="val" if unit == 0 else "train",
            unit=unit,
            documents=[source.integers(0, VOCAB, size=count, dtype=np.uint16)],
        )
        for unit, count in enumerate([1000, *shard_tokens])
    ]
    return manifest.publish(directory, written, vocab_size=VOCAB, plan={"seed": seed})


def config(data: Path | str, **train: Any) -> Config:
    """12 steps of 256 tokens; with 4 ranks two micro batches each, with dropout."""
    settings: dict[str, Any] = {
        "total_steps": 12,
        "tokens_per_step": 256,
        "micro_batch_size": 2,
        "device": "cpu",
        "eval_every": 6,
        "eval_tokens": 512,
        **train,
    }
    return Config(
        model=ModelConfig(
            n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=VOCAB, padded_vocab_size=VOCAB, dropout=0.1
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_tokens=512),
        train=TrainConfig(**settings),
        data=DataConfig(dir=str(data), shuffle_shards=2),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=4),
        requeue=RequeueConfig(backoff_s=0.0),
    )


def run_ranks(
    run: RunDir, settings: Config, *, nproc: int, restart: int = 0, job: str = "tiny", options: Sequence[str] = ()
) -> int:
    """One attempt with real processes; `options` are those of rank.py. Returns the launcher's exit code."""
    run.create()
    config_io.store(starting.check_start(run, settings, world_size=nproc)[0], run.config)
    command = (sys.executable, str(RANK_PROGRAM), str(run.path), *options)
    os.environ["OMP_NUM_THREADS"] = "1"
    with SignalRelay().installed() as relay:
        return run_attempt(LocalJob(command, run, nproc, job), restart=restart, relay=relay)


def newest(run: RunDir) -> Checkpoint:
    found = newest_valid(run.checkpoints, lambda text: None)
    assert found is not None, f"no checkpoint in {run.checkpoints}"
    return found


def content(found: Checkpoint) -> dict[str, Any]:
    """What must be equal for two checkpoints to be the same bytes: files' hashes, position, scaler, step; no times."""
    facts = found.manifest()
    return {
        "files": {name: entry["sha256"] for name, entry in facts["files"].items() if name != METRICS},
        **{key: facts[key] for key in ("step", "world_size", "data", "scaler")},
    }


def copy_run(source: RunDir, target: Path) -> RunDir:
    shutil.copytree(source.path, target)
    return RunDir(target)


def losses(run: RunDir, kind: str = "train") -> dict[int, float]:
    """`step kind value` lines of log.txt; each step once."""
    rows = [line.split() for line in run.log.read_text().splitlines()]
    found = [(int(step), float(value)) for step, word, value in rows if word == kind]
    assert len(found) == len(dict(found)), f"a step is logged twice in {run.log}"
    return dict(found)


def here(*words: str) -> list[str]:
    """The same command, for this machine even where a Slurm is installed, unless it names a cluster."""
    return [*words, *(["--cluster", "local"] if words[0] == "submit" and "--cluster" not in words else [])]


def gpt2hpc(
    *arguments: str | Path, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The command line, as a user has it."""
    command = [sys.executable, "-m", "gpt2hpc", *here(*map(str, arguments))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False, **options)


def flags(settings: Config) -> list[str]:
    """The settings as command-line flags."""
    pairs = config_io.flat(dataclasses.asdict(settings))
    return [f"--{key}={'null' if value is None else value}" for key, value in pairs]
