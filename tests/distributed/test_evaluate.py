"""`gpt2hpc evaluate` and HellaSwag while training, with real processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2hpc.config import Config, ModelConfig
from gpt2hpc.run_dir import RunDir
from tests import questions, tiny
from tests.published import directory_of
from tests.tiny import gpt2hpc

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=128)
COUNT = 211
"""No number of processes here divides it, nor the batches that it makes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory_of(tmp_path_factory.mktemp("model"), SHAPE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions.write(tmp_path_factory.mktemp("questions") / "hellaswag_val.jsonl", COUNT)


def measured(*words: str | Path) -> list[dict[str, Any]]:
    done = gpt2hpc("evaluate", *words, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    return [{**json.loads(line), "seconds": None} for line in done.stdout.splitlines()]


def test_any_number_of_processes_counts_the_same(model: Path, source: Path) -> None:
    alone, *others = (measured(model, "--hellaswag", source, "--nproc", str(nproc)) for nproc in (1, 2, 3, 4))
    assert alone[0]["hellaswag_examples"] == COUNT
    assert 0 < alone[0]["hellaswag_acc"] < 1
    assert all(found == alone for found in others)


def with_two_ranks(*words: str | Path) -> tuple[subprocess.Popen[bytes], list[str]]:
    """An evaluation under way, and the pids of its ranks."""
    command = ["-m", "gpt2hpc.evaluate", *map(str, words), "--device", "cpu", "--nproc", "2"]
    # Ctrl-C works even where this is a background job, which ignores it.
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    deadline = time.monotonic() + 60
    while len(ranks := children.read_text().split()) < 2:
        assert time.monotonic() < deadline, "no ranks"
        time.sleep(0.05)
    return started, ranks


def gone(pids: list[str]) -> bool:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_evaluation_is_started_again(model: Path, source: Path, tmp_path: Path) -> None:
    """Nothing of it stays: no process, no half-written result."""
    many, out = questions.write(tmp_path / "val.jsonl", 20_000), tmp_path / "new" / "result.json"
    started, ranks = with_two_ranks(model, "--out", out, "--hellaswag", many)
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert started.wait(120) != 0
    assert gone(ranks)
    assert not out.exists()
    measured(model, "--out", out, "--hellaswag", source, "--nproc", "2")
    (result,) = json.loads(out.read_text())
    assert result["hellaswag_examples"] == COUNT
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 6), (signal.SIGINT, 6), (signal.SIGKILL, -9)])
def test_it_ends_when_it_is_told_to(model: Path, tmp_path: Path, number: int, code: int) -> None:
    """With its ranks, also where the launcher has no time to tell them."""
    started, ranks = with_two_ranks(model, "--hellaswag", questions.write(tmp_path / "val.jsonl", 30_000))
    time.sleep(5)
    started.send_signal(number)
    assert started.wait(60) == code
    assert gone(ranks)


def trained(run: RunDir, data: Path, *words: str) -> None:
    done = gpt2hpc("train", "--run-dir", run.path, *tiny.flags(settings(data)), *words)
    assert done.returncode == 0, done.stderr


def settings(data: Path) -> Config:
    config = tiny.config(data)
    shape = {"block_size": 64, "vocab_size": 50_257, "padded_vocab_size": 50_304, "dropout": 0.1}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **shape),
        train=dataclasses.replace(config.train, tokens_per_step=512),
    )


def test_while_training_each_step_once_and_no_byte_of_it_changes(data: Path, source: Path, tmp_path: Path) -> None:
    plain, asked = RunDir(tmp_path / "plain"), RunDir(tmp_path / "asked")
    trained(plain, data)
    words = [f"--train.hellaswag={source}", "--train.hellaswag_every=4", "--train.hellaswag_examples=40", "--nproc=2"]
    words.append("--train.sample_every=5")
    trained(asked, data, *words, "--steps=7")
    trained(asked, data, *words, "--steps=12")
    answers = tiny.losses(asked, "hella")
    assert set(answers) == {4, 7, 8, 12}
    logged = [json.loads(line) for line in asked.metrics.read_text().splitlines()]
    logged = [facts for facts in logged if "hellaswag_acc" in facts]
    assert [facts["step"] for facts in logged] == [4, 7, 8, 12]
    assert {facts["hellaswag_examples"] for facts in logged} == {40}
    assert [round(facts["hellaswag_acc_norm"], 6) for facts in logged] == list(answers.values())
    assert [path.name for path in sorted(asked.samples.iterdir())] == [
        f"step00000{step}.txt" for step in ("05", "07", "10", "12")
    ]
    assert "Once upon a time" in asked.sample(12).read_text()
    assert asked.sample(12).read_text() != asked.sample(5).read_text()
    again = RunDir(tmp_path / "again")
    trained(again, data, "--nproc=2", "--steps=7")
    trained(again, data, "--nproc=2", "--steps=12")
    assert tiny.content(tiny.newest(asked))["files"] == tiny.content(tiny.newest(again))["files"]
    found = measured(asked.path, plain.path, "--hellaswag", source, "--examples", "40")
    assert found[0]["hellaswag_acc_norm"] == logged[-1]["hellaswag_acc_norm"]


def test_a_validation_split_alone_and_one_of_another_vocabulary(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x_val_000000.npy", np.arange(1000, dtype=np.uint16) + 49_000)
    (found,) = measured(model, "--hellaswag", "none", "--val", tmp_path)
    assert found["val_tokens"] == 896
    small = directory_of(tmp_path / "small", dataclasses.replace(SHAPE, vocab_size=256, padded_vocab_size=256))
    done = gpt2hpc("evaluate", small, "--hellaswag", "none", "--val", tmp_path, "--device", "cpu")
    assert done.returncode == 4
    assert done.stderr == (
        f"gpt2hpc: error: --val={tmp_path} has tokens up to 50256, and the model knows 256; give data of its own tokenizer\n"
    )


def test_a_published_name_is_no_directory_here(tmp_path: Path) -> None:
    """Without a network, and with none of its files here, it cannot be had, whatever lies about."""
    (tmp_path / "gpt2" / "checkpoints").mkdir(parents=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    val = ("--hellaswag", "none", "--val", tmp_path)
    for source, told in (("gpt2", "gpt2 "), ("./gpt2", "gpt2 holds no checkpoint")):
        done = gpt2hpc("evaluate", source, *val, "--device", "cpu", cwd=tmp_path, env=offline)
        assert (done.returncode != 0, told in done.stderr) == (True, True)
        assert ("holds no checkpoint" in done.stderr) is (source == "./gpt2")


def test_every_checkpoint_and_the_validation_loss(data: Path, source: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    trained(run, data)
    every = measured(run.path, "--all", "--hellaswag", "none", "--val", data, "--nproc", "2")
    assert [found["model"].rpartition("_step")[2] for found in every] == ["0000003", "0000006", "0000009", "0000012"]
    alone = measured(run.path, "--hellaswag", "none", "--val", data)
    assert alone[0]["val_loss"] == pytest.approx(every[-1]["val_loss"], rel=1e-6)
    assert alone[0]["val_tokens"] == 1000 // 64 * 64 - 64 * (1000 % 64 == 0)
    assert alone[0]["val_perplexity"] == pytest.approx(math.exp(alone[0]["val_loss"]))
    assert tiny.losses(run, "val")[12] == pytest.approx(
        measured(run.path, "--hellaswag", "none", "--val", data, "--val-tokens", "512")[0]["val_loss"], abs=1e-5
    )
    table = gpt2hpc("evaluate", run.path, "--hellaswag", source, "--examples", "5", "--device", "cpu")
    assert "of 5 examples" in table.stdout
    assert "GPT-2 124M" in table.stdout
    assert "arXiv:2005.14165" in table.stdout


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--hellaswag", "none"], 2, "nothing to measure"),
        (["--hellaswag", "nowhere.jsonl"], 4, "nowhere.jsonl does not exist"),
        (["--nproc", "0"], 2, "--nproc=0 must be 1 or more"),
        (["--all"], 2, "--all is for runs"),
        (["nowhere"], 4, "nowhere does not exist; name a run"),
        (["--hellaswag", "none", "--val", "nowhere"], 4, "data.dir=nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(model: Path, words: list[str], code: int, told: str) -> None:
    done = gpt2hpc("evaluate", model, *words, "--device", "cpu")
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_that_has_saved_nothing_is_one_line(tmp_path: Path, source: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    for words in ([], ["--all"]):
        done = gpt2hpc("evaluate", run.path, *words, "--hellaswag", source, "--device", "cpu")
        assert done.returncode == 9, done.stderr
        assert "checkpoint; give a run that has saved one" in done.stderr


def test_a_training_without_its_examples_does_not_begin(data: Path, tmp_path: Path) -> None:
    for words, code, told in (
        (["--train.hellaswag=nowhere.jsonl"], 4, "nowhere.jsonl does not exist"),
        (["--train.sample_every=5", "--model.vocab_size=50000"], 3, "train.sample_every=5, but model.vocab_size=50000"),
        ([f"--train.hellaswag={data}"], 4, "gpt2hpc stage --hellaswag"),
    ):
        done = gpt2hpc("train", "--run-dir", tmp_path / "run", *tiny.flags(settings(data)), *words)
        assert done.returncode == code, done.stderr
        assert told in done.stderr
