"""What saves memory changes no bit: blocks that are computed again, and an optimizer whose state is spread over the ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2hpc.cluster.signals import SignalFlag
from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.jobs import Train
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import heap
from tests import tiny

RANKS = 3
"""With two, gradients are summed in any order to the same bits."""


def settings_with(data: Manifest, **train: Any) -> Config:
    """12 steps with dropout, two micro batches each on three ranks."""
    return tiny.config(data.where, **{"tokens_per_step": 192, **train})


@pytest.fixture(scope="module")
def plain(shared_data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("plain") / "run")
    assert tiny.run_ranks(run, settings_with(shared_data), nproc=RANKS, options=["--state-bytes"]) == 0
    return run


def state_bytes(run: RunDir) -> list[int]:
    """Of each rank, what its optimizer held in memory at the end."""
    return [int((run.path / f"state-bytes-{rank}").read_text()) for rank in range(RANKS)]


def tensors(run: RunDir) -> dict[str, torch.Tensor]:
    return dict(tiny.newest(run).tensors())


def assert_same(one: RunDir, other: RunDir) -> None:
    """Bytes of weights and optimizer, generators of all ranks, and every loss."""
    mine, others = tensors(one), tensors(other)
    assert mine.keys() == others.keys()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
    hashes = [
        {name: digest for name, digest in tiny.content(tiny.newest(run))["files"].items() if name.startswith("rank-")}
        for run in (one, other)
    ]
    assert hashes[0] == hashes[1]
    for kind in ("train", "val"):
        assert tiny.losses(one, kind) == tiny.losses(other, kind)


def test_activation_checkpointing(plain: RunDir, shared_data: Manifest, tmp_path: Path) -> None:
    """Left alone, and stopped and resumed without it: the bytes of a run that never heard of it."""
    run, cut = RunDir(tmp_path / "run"), RunDir(tmp_path / "cut")
    recomputed = settings_with(shared_data, activation_checkpointing=True)
    assert tiny.run_ranks(run, recomputed, nproc=RANKS) == 0
    assert tiny.run_ranks(cut, recomputed, nproc=RANKS, options=["--signal", "4", "1"]) == 0
    assert tiny.run_ranks(cut, settings_with(shared_data), nproc=RANKS, restart=1) == 0
    for each in (run, cut):
        assert tiny.content(tiny.newest(each)) == tiny.content(tiny.newest(plain))
    assert_same(run, plain)


def test_gradients_that_stay_where_they_are(plain: RunDir, shared_data: Manifest, tmp_path: Path) -> None:
    """Of CUDA graphs what a CPU has too: adding up in place. Exact continuation, and the curve of a run without."""
    run, cut = RunDir(tmp_path / "run"), RunDir(tmp_path / "cut")
    replayed = settings_with(shared_data, cuda_graphs=True)
    assert tiny.run_ranks(run, replayed, nproc=RANKS) == 0
    assert tiny.run_ranks(cut, replayed, nproc=RANKS, options=["--signal", "4", "1"]) == 0
    assert tiny.run_ranks(cut, replayed, nproc=RANKS, restart=1) == 0
    assert tiny.content(tiny.newest(cut)) == tiny.content(tiny.newest(run))
    for kind in ("train", "val"):
        assert tiny.losses(run, kind) == pytest.approx(tiny.losses(plain, kind), abs=1e-5)


def test_gradients_that_stay_where_they_are_compiled(shared_data: Manifest, tmp_path: Path) -> None:
    """Compiled for replay, which a CPU passes over; the curve of a run that is compiled as always."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs g++, which this machine lacks")
    runs = {graphs: RunDir(tmp_path / f"{graphs}") for graphs in (False, True)}
    for graphs, run in runs.items():
        base = tiny.config(shared_data.where, compile=True)
        settings = dataclasses.replace(base, train=dataclasses.replace(base.train, cuda_graphs=graphs))
        assert tiny.run_ranks(run, settings, nproc=1) == 0
    for kind in ("train", "val"):
        assert tiny.losses(runs[True], kind) == pytest.approx(tiny.losses(runs[False], kind), abs=1e-5)


def test_freed_memory_is_kept_on_a_cpu_and_given_back_at_each_save(
    shared_data: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(heap, "keep_freed", lambda: calls.append("kept"))
    monkeypatch.setattr(heap, "give_back", lambda: calls.append("given back"))
    Train(str(tmp_path / "run"), settings_with(shared_data, preflight="off"))(SignalFlag())
    assert calls == ["kept", *["given back"] * (12 // 3)], "before the model, and at steps 3, 6, 9 and 12"
    calls.clear()
    auto = settings_with(shared_data, preflight="off", micro_batch_size="auto")
    Train(str(tmp_path / "auto"), auto)(SignalFlag())
    assert "kept" not in calls, "what is kept comes to lie in pieces, and takes more than a trial has seen"


@pytest.mark.timeout(1200)
def test_sharded_optimizer(plain: RunDir, shared_data: Manifest, tmp_path: Path) -> None:
    """Stopped, resumed without it, stopped, and resumed with it again: the bytes of a run that never heard of it."""
    run, cut = RunDir(tmp_path / "run"), RunDir(tmp_path / "cut")
    sharded, whole = settings_with(shared_data, shard_optimizer=True), settings_with(shared_data)
    assert tiny.run_ranks(run, sharded, nproc=RANKS, options=["--state-bytes"]) == 0
    assert_same(run, plain)
    all_of_it = state_bytes(plain)[0]
    assert sum(state_bytes(run)) == all_of_it, "each is held once"
    assert max(state_bytes(run)) < 0.4 * all_of_it, "by a third of it each"
    assert tiny.run_ranks(cut, sharded, nproc=RANKS, options=["--signal", "3", "1"]) == 0
    assert tiny.run_ranks(cut, whole, nproc=RANKS, restart=1, options=["--signal", "7", "2"]) == 0
    assert tiny.run_ranks(cut, sharded, nproc=RANKS, restart=2, options=["--state-bytes"]) == 0
    assert state_bytes(cut) == state_bytes(run)
    assert tiny.content(tiny.newest(cut)) == tiny.content(tiny.newest(run))


@pytest.mark.timeout(1200)
def test_sharded_on_other_numbers_of_ranks(shared_data: Manifest, tmp_path: Path) -> None:
    """3 → 1 → 2 ranks, without dropout, whose draws belong to a rank: the curve of a run on 3 without it."""
    base = settings_with(shared_data, shard_optimizer=True)
    sharded = dataclasses.replace(base, model=dataclasses.replace(base.model, dropout=0.0))
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    without = dataclasses.replace(sharded, train=dataclasses.replace(sharded.train, shard_optimizer=False))
    assert tiny.run_ranks(whole, without, nproc=3) == 0
    assert tiny.run_ranks(run, sharded, nproc=3, options=["--signal", "3", "1"]) == 0
    assert tiny.run_ranks(run, sharded, nproc=1, restart=1, options=["--signal", "7", "0"]) == 0
    assert tiny.run_ranks(run, sharded, nproc=2, restart=2) == 0
    assert len(list(tiny.newest(run).path.glob("state-*"))) == 2
    assert list(tiny.losses(run).values()) == pytest.approx(list(tiny.losses(whole).values()), abs=1e-4)


def test_sharded_with_a_loss_scale(shared_data: Manifest, tmp_path: Path) -> None:
    """fp16, emulated on the CPU: a step that overflows is passed over by every rank, whosoever's gradients it were."""
    plain, sharded = RunDir(tmp_path / "plain"), RunDir(tmp_path / "sharded")
    scale = ("--loss-scale", str(2.0**26))
    for run, shard_optimizer in ((plain, False), (sharded, True)):
        settings = settings_with(shared_data, precision="fp16", shard_optimizer=shard_optimizer)
        assert tiny.run_ranks(run, settings, nproc=RANKS, options=scale) == 0
    assert tiny.newest(sharded).manifest()["scaler"] == tiny.newest(plain).manifest()["scaler"]
    assert tiny.newest(sharded).manifest()["scaler"]["scale"] < 2.0**26, "no overflow, so the test shows nothing"
    assert_same(sharded, plain)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which this machine lacks")
@pytest.mark.timeout(1200)
def test_activation_checkpointing_compiled(shared_data: Manifest, tmp_path: Path) -> None:
    """With dropout: the curve of a compiled run without it, and exact continuation."""
    plain, run, cut = (RunDir(tmp_path / name) for name in ("plain", "run", "cut"))
    settings = tiny.config(shared_data.where, compile=True, activation_checkpointing=True)
    without = dataclasses.replace(settings, train=dataclasses.replace(settings.train, activation_checkpointing=False))
    assert tiny.run_ranks(plain, without, nproc=2) == 0
    assert tiny.run_ranks(run, settings, nproc=2) == 0
    assert list(tiny.losses(run).values()) == pytest.approx(list(tiny.losses(plain).values()), abs=1e-4)
    assert tiny.run_ranks(cut, settings, nproc=2, options=["--signal", "4", "1"]) == 0
    assert tiny.run_ranks(cut, settings, nproc=2, restart=1) == 0
    assert tiny.content(tiny.newest(cut)) == tiny.content(tiny.newest(run))


# train.micro_batch_size: auto -------------------------------------------------------------------------------------


def noted(run: RunDir) -> tuple[int, str]:
    facts = json.loads(run.micro_batch.read_text())
    return facts["micro_batch_size"], facts["state"]


@pytest.mark.timeout(1200)
def test_auto_goes_on_with_what_it_found(shared_data: Manifest, tmp_path: Path) -> None:
    """All four sequences of a rank fit at once: the bytes of a run that was told so, also stopped and resumed."""
    told, run = RunDir(tmp_path / "told"), RunDir(tmp_path / "run")
    assert tiny.run_ranks(told, settings_with(shared_data, micro_batch_size=4), nproc=RANKS) == 0
    auto = settings_with(shared_data, micro_batch_size="auto")
    assert tiny.run_ranks(run, auto, nproc=RANKS, options=["--signal", "4", "1"]) == 0
    assert noted(run) == (4, "proven")
    assert tiny.newest(run).manifest()["config"]["train"]["micro_batch_size"] == 4
    searched = run.micro_batch.stat().st_mtime_ns
    assert tiny.run_ranks(run, auto, nproc=RANKS, restart=1) == 0
    assert run.micro_batch.stat().st_mtime_ns == searched, "it has looked again"
    assert tiny.content(tiny.newest(run)) == tiny.content(tiny.newest(told))
    assert tiny.losses(run) == tiny.losses(told)


@pytest.mark.timeout(1200)
def test_auto_goes_on_with_what_a_checkpoint_knows(
    shared_data: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty disk has but that, and more memory may be free than there was; other micro batches are said to be others."""
    run = RunDir(tmp_path / "run")
    auto = settings_with(shared_data, micro_batch_size="auto")
    assert tiny.run_ranks(run, auto, nproc=2, options=["--signal", "4", "1"]) == 0
    facts = json.loads(run.micro_batch.read_text())
    assert tiny.newest(run).manifest()["micro_batch"] == {"micro_batch_size": 6, "of": facts["of"]}
    run.micro_batch.write_text(json.dumps({**facts, "micro_batch_size": 3}))
    assert tiny.run_ranks(run, auto, nproc=2, restart=1, options=["--signal", "8", "1"]) == 0
    assert "warning: micro batches of 3 instead of 6: not bit-identical" in capfd.readouterr().out
    run.micro_batch.unlink()
    assert tiny.run_ranks(run, auto, nproc=2, restart=2) == 0
    assert noted(run) == (3, "proven")
    assert "not bit-identical" not in capfd.readouterr().out


@pytest.mark.timeout(1200)
def test_auto_after_a_lack_of_memory(shared_data: Manifest, tmp_path: Path) -> None:
    """Rank 1 asks for more than the machine has in step 5; the next attempt takes less, and other ranks find anew."""
    run = RunDir(tmp_path / "run")
    auto = settings_with(shared_data, micro_batch_size="auto")
    assert tiny.run_ranks(run, auto, nproc=RANKS, options=["--starve", "5", "1"]) not in (0, 3)
    assert noted(run) == (4, "too large")
    assert "out of memory with micro batches of 4" in run.rank_log("tiny", 0, 1).read_text()
    assert tiny.run_ranks(run, auto, nproc=RANKS, restart=1, options=["--signal", "8", "0"]) == 0
    assert noted(run) == (2, "proven")
    assert tiny.run_ranks(run, auto, nproc=2, restart=2) == 0
    assert noted(run) == (6, "proven")
    facts = json.loads(run.micro_batch.read_text()) | {"state": "tried"}
    assert facts["of"]["world_size"] == 2
    longer = dataclasses.replace(auto, train=dataclasses.replace(auto.train, total_steps=14))
    run.micro_batch.write_text(json.dumps(facts))  # as of an attempt that was killed in its first step
    assert tiny.run_ranks(run, longer, nproc=2, restart=3) == 0
    assert noted(run) == (3, "proven")


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory cgroup of 1.2 GB, of v1 or v2, to which processes may be added."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"gpt2hpc-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    limits = [group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists()]
    if not limits:
        group.rmdir()
        pytest.skip("cgroups here have no limit of memory")
    try:
        limits[0].write_text("1200M")
        yield group
    finally:
        group.rmdir()


@pytest.mark.timeout(2000)
def test_auto_keeps_within_a_cgroup(small_group: Path, tmp_path: Path) -> None:
    """64 sequences of a step need five times what the group has: the kernel kills who takes them at once, and not who asks auto."""
    data = tiny.make_data(tmp_path / "data", shard_tokens=(30_000,))
    words = ["--model.n_layer=1", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=128", "--device=cpu"]
    words += ["--train.tokens_per_step=8192", "--steps=2", "--optimizer.warmup_tokens=0", "--train.eval_tokens=512"]
    codes, told = {}, {}
    for size in ("64", "auto"):
        command = [sys.executable, "-m", "gpt2hpc", "train", f"--run-dir={tmp_path / size}", f"--data.dir={data.where}"]
        command += [*words, f"--train.micro_batch_size={size}"]
        inside = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(small_group), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(inside, env=environment, timeout=900, check=False, stderr=subprocess.PIPE, text=True)
        codes[size], told[size] = done.returncode, done.stderr
    assert codes["64"] != 0, "it fits, so the test shows nothing"
    assert "rank 0 was killed by signal 9, as the kernel does where memory runs out" in told["64"]
    assert codes["auto"] == 0, told["auto"]
    size, state = noted(RunDir(tmp_path / "auto"))
    assert (2 <= size <= 16, state) == (True, "proven"), size
