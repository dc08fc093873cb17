"""What counts as a spike of the loss, and that a restart changes nothing of it."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.metrics import MetricsLog, StepRecord
from gpt2hpc.training.spikes import LEAST, WINDOW, Spikes


def wavering(count: int) -> list[float]:
    source = random.Random(0)
    return [3.0 + source.uniform(-0.1, 0.1) for _ in range(count)]


def test_a_jump_is_a_spike_and_wavering_is_none() -> None:
    spikes = Spikes(wavering(WINDOW))
    assert not any(map(spikes.sees, wavering(WINDOW)))
    assert not spikes.sees(3.15), "within four deviations"
    assert spikes.sees(3.4)
    assert not spikes.sees(2.0), "a fall is none"


def test_the_first_losses_are_none() -> None:
    spikes = Spikes()
    losses = wavering(LEAST)
    losses[LEAST // 2] = 9.0
    assert not any(map(spikes.sees, losses))


def test_only_the_last_losses_count() -> None:
    spikes = Spikes([10.0] * 1000 + wavering(WINDOW))
    assert spikes.sees(3.4)


def test_a_loss_that_is_not_finite_is_none_and_leaves_the_band() -> None:
    spikes = Spikes([math.nan, *wavering(WINDOW)])
    assert not spikes.sees(math.nan)
    assert not spikes.sees(math.inf)
    assert spikes.sees(3.4)


def logged(run: RunDir, losses: list[float], *, stops_after: tuple[int, ...]) -> list[dict[str, float]]:
    """All lines of a run of these losses that was resumed after those steps."""
    for begin, end in itertools.pairwise((0, *stops_after, len(losses))):
        log = MetricsLog(run, resumed_step=begin, fence=lambda: None, say=lambda text: None)
        for step in range(begin + 1, end + 1):
            log.step(StepRecord(step, losses[step - 1], 1e-3, 1.0, 10.0, 100.0, None, 0.1, 0.5), len(losses))
        log.close()
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_a_resumed_run_tells_the_same_spikes(tmp_path: Path) -> None:
    losses = wavering(130)
    losses[60], losses[61], losses[120] = 3.5, 3.45, 3.6
    told = []
    for name, stops in (("whole", ()), ("resumed", (10, 60, 61, 119))):
        run = RunDir(tmp_path / name)
        run.create()
        told.append([facts["step"] for facts in logged(run, losses, stops_after=stops) if "spike" in facts])
    assert told[0] == told[1]
    assert told[0][0] == 61
    assert told[0][-1] == 121
