"""A little training that is stopped half-way and goes on: the bytes of one that was left alone?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpt2hpc import config_io, starting
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gpt2hpc.data import manifest, shards
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.trials.bench import Bench, TrialError
from gpt2hpc.trials.ranks import run_ranks

VOCAB = 256
STEPS = 6
NPROC = 2


def run(bench: Bench) -> str:
    """With dropout and two processes, or with as many as there are GPUs below that."""
    nproc = NPROC if bench.device == "cpu" else min(NPROC, max(1, bench.gpus))
    config = _config(bench, _data(bench.folder / "data"))
    undisturbed, stopped = RunDir(bench.folder / "undisturbed"), RunDir(bench.folder / "stopped")
    _train(bench, undisturbed, config, nproc)
    stopped.create()
    stopped.stop.touch()  # seen in the first step, agreed on in the second
    _train(bench, stopped, config, nproc)
    step = _newest(stopped).step
    if not 0 < step < STEPS:
        raise TrialError(f"a training of {STEPS} steps that was told to stop at the first one ended at step {step}")
    _train(bench, stopped, config, nproc, restart=1)
    same = _same(_newest(undisturbed), _newest(stopped))
    return f"{nproc} process{'es' if nproc > 1 else ''}, stopped at step {step} of {STEPS}, {same}"


def _train(bench: Bench, run: RunDir, config: Config, nproc: int, restart: int = 0) -> None:
    """An attempt, by the trainer that every training has."""
    run.create()
    config_io.store(starting.check_start(run, config, world_size=nproc)[0], run.config)
    gpus = nproc if bench.device == "cuda" else 0
    run_ranks(
        bench, run, "gpt2hpc.train", "--run-dir", str(run.path), "--quiet", nproc=nproc, gpus=gpus, restart=restart
    )
    outcome = Ledger(run).outcome()
    if outcome is None or not run.has_checkpoints:
        raise TrialError("a training ended well, but has saved nothing")


def _data(directory: Path) -> Path:
    """Random tokens: two shards to train on, one to validate."""
    directory.mkdir()
    source = np.random.default_rng(0)
    written = [
        shards.write_shard(
            directory,
            split="val" if unit == 0 else "train",
            unit=unit,
            documents=[source.integers(0, VOCAB, size=3000, dtype=np.uint16)],
        )
        for unit in range(3)
    ]
    manifest.publish(directory, written, vocab_size=VOCAB, plan={"seed": 0})
    return directory


def _config(bench: Bench, data: Path) -> Config:
    model = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=VOCAB, padded_vocab_size=VOCAB, dropout=0.1
    )
    train = TrainConfig(
        total_steps=STEPS,
        tokens_per_step=16 * 2 * 4,
        micro_batch_size=2,
        device=bench.device,
        compile=False,
        deterministic=True,
        eval_every=STEPS,
        eval_tokens=256,
        preflight="off",
    )
    return Config(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_tokens=128),
        train=train,
        data=DataConfig(dir=str(data)),
        checkpoint=CheckpointConfig(keep_last=2),
    )


def _newest(run: RunDir) -> Checkpoint:
    found = checkpoint.newest_valid(run.checkpoints, lambda text: None)
    if found is None:
        raise TrialError(f"{run.name}: no whole checkpoint was left")
    return found


def _same(undisturbed: Checkpoint, resumed: Checkpoint) -> str:
    """What is to be said of equal ones; TrialError where a byte differs. The log in it holds times, and is left out."""
    if undisturbed.step != resumed.step:
        raise TrialError(
            f"the resumed training ended at step {resumed.step}, and the undisturbed one at step {undisturbed.step}"
        )
    files = [{path.name: path for path in each.path.glob("*.safetensors")} for each in (undisturbed, resumed)]
    if files[0].keys() != files[1].keys():
        raise TrialError("the resumed training has saved other files than the undisturbed one")
    for name, path in sorted(files[0].items()):
        if path.read_bytes() != files[1][name].read_bytes():
            raise TrialError(f"{name} differs between a resumed training and an undisturbed one")
    size = sum(path.stat().st_size for path in files[0].values())
    return f"resumed to the {size:,} bytes of an undisturbed one"
