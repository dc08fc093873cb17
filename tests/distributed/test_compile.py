"""torch.compile: the same names in the file, the same curve, and exact continuation, with a warm cache and with a cold one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny


@pytest.mark.timeout(1800)  # it compiles twice from nothing, in three processes
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which this machine lacks")
def test_compiled(shared_data: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in compile_cache.FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(compile_cache.PLACE, str(tmp_path / "node"))
    eager, compiled, cut = (RunDir(tmp_path / name) for name in ("eager", "compiled", "cut"))
    settings = tiny.config(shared_data.where, compile=True, tokens_per_step=288)
    model = tiny.dataclasses.replace(settings.model, dropout=0.0, n_layer=1)  # each layer costs the compiler seconds
    plain = tiny.dataclasses.replace(settings, model=model)
    without = tiny.dataclasses.replace(plain, train=tiny.dataclasses.replace(plain.train, compile=False))
    assert tiny.run_ranks(eager, without, nproc=3) == 0
    assert tiny.run_ranks(compiled, plain, nproc=3) == 0
    assert list(tiny.losses(compiled).values()) == pytest.approx(list(tiny.losses(eager).values()), abs=1e-4)
    names = [{name for name, _ in tiny.newest(run).tensors()} for run in (eager, compiled)]
    assert names[0] == names[1], "a prefix of the wrapper reached the file"
    assert tiny.run_ranks(cut, plain, nproc=3, options=["--signal", "4", "1"]) == 0
    moved = tiny.copy_run(cut, tmp_path / "moved")  # to a node that has compiled nothing
    assert tiny.run_ranks(cut, plain, nproc=3, restart=1) == 0
    monkeypatch.setenv(compile_cache.PLACE, str(tmp_path / "another"))
    assert tiny.run_ranks(moved, plain, nproc=3, restart=1) == 0
    for run in (cut, moved):
        assert tiny.content(tiny.newest(run)) == tiny.content(tiny.newest(compiled))
    states = {
        run.name: [each.compile_cache for each in Ledger(run).attempts()] for run in (eager, compiled, cut, moved)
    }
    assert states["eager"] == [None]
    assert states["compiled"][0] != "warm", "nothing was there, but what the other ranks compile at the same time"
    assert states["cut"] == ["warm", "warm"], "a later process compiles again what an earlier one has compiled"
    assert states["moved"][0] == "warm"
    assert states["moved"][1] != "warm"
