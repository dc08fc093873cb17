"""torch.compile: the same names in the file, the same curve, and exact continuation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gpt2hpc.data.manifest import Manifest
from gpt2hpc.run_dir import RunDir
from tests import tiny


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which this machine lacks")
def test_compiled(shared_data: Manifest, tmp_path: Path) -> None:
    eager, compiled, cut = (RunDir(tmp_path / name) for name in ("eager", "compiled", "cut"))
    settings = tiny.config(shared_data.where, compile=True)
    plain = tiny.dataclasses.replace(settings, model=tiny.dataclasses.replace(settings.model, dropout=0.0))
    without = tiny.dataclasses.replace(plain, train=tiny.dataclasses.replace(plain.train, compile=False))
    assert tiny.run_ranks(eager, without, nproc=2) == 0
    assert tiny.run_ranks(compiled, plain, nproc=2) == 0
    assert list(tiny.losses(compiled).values()) == pytest.approx(list(tiny.losses(eager).values()), abs=1e-4)
    names = [{name for name, _ in tiny.newest(run).tensors()} for run in (eager, compiled)]
    assert names[0] == names[1], "a prefix of the wrapper reached the file"
    assert tiny.run_ranks(cut, plain, nproc=2, options=["--signal", "4", "1"]) == 0
    assert tiny.run_ranks(cut, plain, nproc=2, restart=1) == 0
    assert tiny.content(tiny.newest(cut)) == tiny.content(tiny.newest(compiled))
