"""The losses of every step, as they were when the model was found to be GPT-2: whatever makes it faster may not change them.

Random weights, order of data, schedule, weight decay and clipping are all in them. On another machine, or with other versions of torch,
the last bits differ; a change of the mathematics differs in the first digits. Where that is what was meant:

    python -m tests.distributed.test_golden_losses
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from gpt2hpc.config import Config
from gpt2hpc.data import manifest, shards
from gpt2hpc.run_dir import RunDir
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS = 40
TOLERANCE = 2e-5


def make_data(directory: Path) -> None:
    """Tokens of which few are frequent, and every other one follows from the one before: there is something to learn."""
    directory.mkdir()
    source, rank = np.random.default_rng(7), np.arange(tiny.VOCAB)
    written = []
    for unit in range(4):
        drawn = source.choice(tiny.VOCAB, size=4000, p=(1 / (rank + 3)) / (1 / (rank + 3)).sum())
        tokens = np.stack([drawn, (drawn * 7 + 3) % tiny.VOCAB], axis=1).reshape(-1).astype(np.uint16)
        split = "val" if unit == 0 else "train"
        written.append(shards.write_shard(directory, split=split, unit=unit, documents=[tokens]))
    manifest.publish(directory, written, vocab_size=tiny.VOCAB, plan={"seed": 7})


def settings(data: Path) -> Config:
    """fp32, eager, without dropout; warm-up and most of the decay.

    The learning rate is one at which what rounding differs by, 1e-6 of a loss, stays that small: another library for products
    rounds otherwise, and at three times the rate AdamW makes 1e-3 of it in forty steps.
    """
    plain = tiny.config(
        data, total_steps=STEPS, tokens_per_step=512, micro_batch_size=4, eval_every=STEPS, precision="fp32"
    )
    model = dataclasses.replace(plain.model, n_layer=3, n_head=4, n_embd=64, block_size=32, dropout=0.0)
    optimizer = dataclasses.replace(plain.optimizer, learning_rate=3e-3, warmup_tokens=2048)
    return dataclasses.replace(
        plain, model=model, optimizer=optimizer, train=dataclasses.replace(plain.train, compile=False)
    )


def losses(folder: Path, *, nproc: int) -> list[float]:
    """Of each step."""
    make_data(folder / "data")
    run = RunDir(folder / "run")
    assert tiny.run_ranks(run, settings(folder / "data"), nproc=nproc) == 0
    found = tiny.losses(run)
    return [found[step] for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("nproc", [1, 2])
def test_every_loss_is_what_it_was(nproc: int, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == STEPS
    assert golden[-1] < golden[0] - 1, "it learns"
    assert losses(tmp_path, nproc=nproc) == pytest.approx(golden, abs=TOLERANCE)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder), nproc=1)
    GOLDEN.write_text("[\n" + ",\n".join(f"  {loss:.6f}" for loss in found) + "\n]\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
