"""What is imported stays, and is not searched for garbage; what a training makes afterwards is."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2hpc import garbage
from gpt2hpc.cluster import dist_env
from tests import tiny


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _afterwards() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_what_is_made_inside_is_left_and_what_comes_later_is_not() -> None:
    gc.collect()
    with garbage.unsought():
        assert not gc.isenabled()
        inside = weakref.ref(Cycle())
    assert gc.isenabled()
    outside = weakref.ref(Cycle())
    gc.collect()
    assert (inside() is None, outside() is None) == (False, True)


def test_a_cycle_through_what_was_left_is_found_at_the_end() -> None:
    """As one of a watchdog, which was there before the trainer was imported, and that trainer."""
    left = Cycle()
    garbage.leave()
    left.me = later = Cycle()
    later.me, gone = left, weakref.ref(later)
    del left, later
    gc.collect()
    assert gone() is not None
    garbage.collect()
    assert gone() is None


def test_an_error_inside_is_no_reason_to_search_no_more() -> None:
    with pytest.raises(ImportError), garbage.unsought():
        raise ImportError
    assert gc.isenabled()


def test_a_rank_searches_only_what_it_has_not_imported(data: Path, tmp_path: Path) -> None:
    """At its first step; torch alone makes more than a hundred thousand objects."""
    program = (
        "import gc, sys\n"
        "from gpt2hpc.training.trainer import Trainer\n"
        "genuine = Trainer.optimizer_step\n"
        "def step(self, stream):\n"
        "    print('searched', gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()))\n"
        "    return genuine(self, stream)\n"
        "Trainer.optimizer_step = step\n"
        "from gpt2hpc import cli, train\n"
        "sys.exit(cli.run(train.main))\n"
    )
    words = ["--run-dir", str(tmp_path / "run"), *tiny.flags(tiny.config(data, total_steps=3))]
    command = [sys.executable, "-c", program, *words]
    alone = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", dist_env.RENDEZVOUS: str(tmp_path / "store")}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line, *_ = [line for line in done.stdout.splitlines() if line.startswith("searched")]
    _, enabled, left, searched = line.split()
    assert enabled == "True"
    assert int(left) > 100_000 > int(searched)
