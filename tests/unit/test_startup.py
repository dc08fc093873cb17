"""How long a start takes is told from the process's own begin, by phase."""

from __future__ import annotations

import functools
import subprocess
import sys
import time

import pytest
import torch
from torch._dynamo.utils import counters

from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import startup
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.startup import CompileCache, StartUp
from tests import tiny

BEGUN_LATE = """
import time
time.sleep(1.5)
from gpt2hpc.training.startup import StartUp
start_up = StartUp()
start_up.done("imports")
print(start_up.seconds)
"""


def test_what_comes_before_any_import_of_ours_counts() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", BEGUN_LATE], capture_output=True, text=True, check=True)
    assert 1.5 <= float(done.stdout) <= time.monotonic() - began + 0.02  # a tick of /proc's clock, and of ours


def test_phases_add_up_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 102.01, 105.0, 105.5])
    monkeypatch.setattr(startup, "_now_s", lambda: next(clock))
    monkeypatch.setattr(startup, "process_began_s", startup._now_s)
    start_up = StartUp()
    for phase in ("imports", "settings", "imports", startup.FIRST_STEP):
        start_up.done(phase)
    assert start_up.phases == pytest.approx({"imports": 2.0 + 2.99, "settings": 0.01, "first step": 0.5})
    told = "start-up: 5.5 s until the first step was done: imports 5.0, first step 0.5"
    assert start_up.line(None) == told
    assert start_up.line(CompileCache(3, 1)) == f"{told}; compile cache partly warm (3 of 4 graphs were there)"


@pytest.mark.parametrize(("hits", "misses", "state"), [(0, 2, "cold"), (2, 0, "warm"), (1, 1, "partly warm")])
def test_a_cache_is_warm_where_graphs_were_there(hits: int, misses: int, state: str) -> None:
    assert CompileCache(hits, misses).state == state


def test_the_warm_up_compiles_all_that_the_first_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves, the first step compiles: minutes in which every rank waits, and the watchdog watches."""
    traced = functools.partialmethod(
        torch.nn.Module.compile, backend="eager"
    )  # as torch.compile does it, but for the code
    monkeypatch.setattr(GPT, "compile", traced)
    settings = tiny.config("none", compile=True, tokens_per_step=64)
    learner = Learner(settings, Ranks(DistEnv.from_env({}), torch.device("cpu")), lambda: None)
    torch.compiler.reset()
    counters.clear()
    learner.wrap()
    learner.warm_up()
    assert counters["stats"]["unique_graphs"] == 1
    tokens = torch.zeros((2, 17), dtype=torch.int64)
    learner.learn([(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())] * 2, 0)
    assert counters["stats"]["unique_graphs"] == 1
