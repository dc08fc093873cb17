"""Each wrong input gets one line that names the key, the value and the mend, and its documented exit code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.tiny import gpt2hpc

VERBS = ["train", "submit"]


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if "warning:" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("gpt2hpc: error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def flags(shared_data: Manifest) -> list[str]:
    return tiny.flags(tiny.config(shared_data.where))


@pytest.mark.parametrize("verb", VERBS)
def test_missing_data(verb: str, flags: list[str], tmp_path: Path) -> None:
    done = gpt2hpc(verb, "--run-dir", tmp_path / "run", *flags, "--data.dir", "/nowhere")
    refused(done, 4, "data.dir=/nowhere", "gpt2hpc prepare")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_misnamed_run_begins_no_other(verb: str, tmp_path: Path) -> None:
    done = gpt2hpc(verb, "--run-dir", "runs/mine", "--nproc", "1", cwd=tmp_path)
    refused(done, 3, "--run-dir=runs/mine holds no run yet", "begin one with --preset smoke")
    done = gpt2hpc(verb, "--run-dir", "runs/mine", "--seed", "9", cwd=tmp_path)
    refused(done, 4, "data.dir=data/demo")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_key_in_yaml(verb: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optimizer:\n  learn_rate: 1e-3\n")
    done = gpt2hpc(verb, "--run-dir", tmp_path / "run", "--config", tmp_path / "mine.yaml")
    refused(done, 3, "optimizer.learn_rate", "did you mean optimizer.learning_rate?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_world_size_that_does_not_divide(verb: str, flags: list[str], tmp_path: Path) -> None:
    done = gpt2hpc(verb, "--run-dir", tmp_path / "run", "--nproc", "3", *flags)
    refused(done, 3, "train.tokens_per_step=256", "2 × 16 × 3 = 96", "try train.tokens_per_step=288")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_unwritable_run_directory(verb: str, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = gpt2hpc(verb, "--run-dir", tmp_path / "file" / "run", *flags)
    refused(done, 9, f"--run-dir={tmp_path}/file/run cannot be written", "choose a directory you own")


def test_manifest_changed_under_a_run(tmp_path: Path) -> None:
    tiny.make_data(tmp_path / "data")
    flags = tiny.flags(tiny.config(tmp_path / "data"))
    run = RunDir(tmp_path / "run")
    assert gpt2hpc("train", "--run-dir", run.path, *flags).returncode == 0
    before = run.config.read_bytes()
    tiny.make_data(tmp_path / "data", seed=1)
    done = gpt2hpc("train", "--run-dir", run.path, "--steps", "20")
    refused(done, 4, f"data.dir={tmp_path}/data changed under the run", "restore the data")
    assert run.config.read_bytes() == before


def test_settings_changed_under_a_run(flags: list[str], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert gpt2hpc("train", "--run-dir", run.path, *flags).returncode == 0
    before = run.config.read_bytes()
    done = gpt2hpc("submit", "--run-dir", run.path, "--optimizer.weight_decay", "0.2", "--seed", "1")
    refused(done, 3, "optimizer.weight_decay=0.2 (the run has 0.1)", "train.seed=1 (the run has 1337)")
    assert run.config.read_bytes() == before


@pytest.mark.parametrize("command", [["train"], ["submit"], ["sample", "."]], ids=" ".join)
def test_no_torch(command: list[str], flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    more = [] if command[0] == "sample" else ["--run-dir", str(tmp_path / "run"), *flags]
    done = gpt2hpc(*command, *more, env={"PYTHONPATH": str(tmp_path)})
    refused(done, 8, "torch is not installed", "pip install 'gpt2hpc[train]'")
    assert not (tmp_path / "run").exists()


def test_vocabulary_of_the_data_does_not_fit(flags: list[str], tmp_path: Path) -> None:
    done = gpt2hpc("train", "--run-dir", tmp_path / "run", *flags, "--model.vocab_size", "200")
    refused(done, 3, "model.vocab_size=200", "set it to 256")


def test_too_little_data(tmp_path: Path) -> None:
    tiny.make_data(tmp_path / "data", shard_tokens=[5])
    done = gpt2hpc("train", "--run-dir", tmp_path / "run", *tiny.flags(tiny.config(tmp_path / "data")))
    refused(done, 4, "too few for one window", "prepare more text")


def test_one_rank_cannot_start_more(flags: list[str], tmp_path: Path) -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "1"}
    done = gpt2hpc("train", "--run-dir", tmp_path / "run", "--nproc", "2", *flags, env=rank)
    refused(done, 2, "--nproc=2", "drop --nproc")
    without_address = {"RANK": "0", "WORLD_SIZE": "2"}
    done = gpt2hpc("train", "--run-dir", tmp_path / "run", *flags, env=without_address)
    refused(done, 2, "MASTER_ADDR and MASTER_PORT")


def test_more_than_one_machine_without_slurm(flags: list[str], tmp_path: Path) -> None:
    done = gpt2hpc("submit", "--run-dir", tmp_path / "run", "--nodes", "4", *flags)
    refused(done, 2, "--nodes=4", "--nodes 1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluat"], ["unknown job evaluat", "train"]),
        (["--time", "0"], ["--time=0", "checkpoint.stop_margin_s=60.0"]),
        (["--nproc", "two"], ["--nproc=two", "a whole number"]),
        (["runs/mine"], ["did you mean --run-dir runs/mine?"]),
        (["--nproc", "0"], ["--nproc=0", "1 or more"]),
        (["--nprocs", "2"], ["--nprocs", "did you mean --nproc?"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_usage(arguments: list[str], words: list[str], flags: list[str], tmp_path: Path) -> None:
    done = gpt2hpc("submit", *arguments, "--run-dir", tmp_path / "run", *flags)
    refused(done, 2, *words)


@pytest.mark.parametrize("gpus", ["0", "0,1"])
def test_gpus_without_cuda_are_no_cpu_run(gpus: str, flags: list[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so nothing is missing")
    flags = [flag for flag in flags if not flag.startswith("--train.device")]
    done = gpt2hpc("train", "--run-dir", tmp_path / "run", *flags, env={"CUDA_VISIBLE_DEVICES": gpus})
    assert done.returncode == 8, done.stderr
    assert "CUDA is not available to torch" in done.stderr
    assert "--device cpu" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_sample_of_nothing(tmp_path: Path) -> None:
    refused(gpt2hpc("sample", tmp_path), 9, "holds no checkpoint")
    refused(gpt2hpc("sample", tmp_path, "--max-tokens", "0"), 2, "--max-tokens=0")
    refused(gpt2hpc("status", tmp_path / "absent"), 9, "is not a directory")
