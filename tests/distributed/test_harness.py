"""EleutherAI's lm-evaluation-harness, on an exported model: it runs, and counts what our losses of its texts say."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gpt2hpc.data import tokenizer
from gpt2hpc.evaluation import hellaswag
from gpt2hpc.evaluation.examples import Example
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import initial, state
from gpt2hpc.training.precision import Precision
from tests import questions, tiny
from tests.hub_server import HubServer, serving
from tests.tiny import gpt2hpc

COUNT = 60


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server


def rows(seed: int) -> list[dict[str, object]]:
    """As in the Hub's files, with a context that is told in two parts."""
    return [
        {**each, "activity_label": "Sailing", "ctx_a": each["ctx"], "ctx_b": "the dog", "label": str(each["label"])}
        for each in questions.examples(COUNT, seed)
    ]


def parquet(found: list[dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found), buffer)
    return buffer.getvalue()


def test_the_harness_counts_what_our_losses_say(hub: HubServer, data: Path, tmp_path: Path) -> None:
    if find_spec("lm_eval") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("lm_eval is not installed")
    asked = rows(seed=1)
    hub.add_repo(
        "Rowan/hellaswag",
        {"data/train-00000.parquet": parquet(rows(seed=2)), "data/validation-00000.parquet": parquet(asked)},
    )
    config = tiny.config(data)
    shape = {"block_size": 128, "vocab_size": 50_257, "padded_vocab_size": 50_304}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **shape),
        train=dataclasses.replace(config.train, total_steps=3, tokens_per_step=512),
    )
    run, exported = tmp_path / "run", tmp_path / "exported"
    assert gpt2hpc("train", "--run-dir", run, *tiny.flags(config)).returncode == 0
    assert gpt2hpc("export", run, "--out", exported).returncode == 0
    options = ["--model", "hf", "--model_args", f"pretrained={exported},dtype=float32", "--tasks", "hellaswag"]
    command = [sys.executable, "-m", "lm_eval", *options, "--device", "cpu", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, **hub.environment("hf_read"), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results*.json")
    told = json.loads(written.read_text())
    assert told["n-samples"]["hellaswag"]["effective"] == COUNT

    encode = tokenizer.gpt2().encode_ordinary
    contexts = [f"{each['activity_label']}: {each['ctx_a']} The dog" for each in asked]
    examples = [
        Example(
            tuple(encode(context)), tuple(tuple(encode(f" {end}")) for end in each["endings"]), int(str(each["label"]))
        )  # type: ignore[attr-defined]
        for context, each in zip(contexts, asked, strict=True)
    ]
    shape_there, weights = initial.named(str(exported))
    model = GPT(shape_there).eval()
    state.load_model(model, weights.items())
    found = hellaswag.score(model, examples, Precision(torch.float32, torch.device("cpu")))
    assert told["results"]["hellaswag"]["acc,none"] == pytest.approx(found.acc)
