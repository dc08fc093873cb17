"""The learning rate over the steps: a pure function of the step, so there is no state of it to save."""

from __future__ import annotations

import dataclasses
import math

from gpt2hpc.config import Config, TrainConfig


def learning_rate(step: int, config: Config) -> float:
    """Of the step after `step` finished ones: linear warm-up, then down to `min_lr_ratio` of the peak.

    "cosine" declines all along (Loshchilov and Hutter 2016, arXiv:1608.03983), so its whole course depends on the length of the run.
    "wsd" stays at the peak, and declines linearly in the last `decay_share` of the steps (Hu et al. 2024, arXiv:2404.06395, section
    4; Hägele et al. 2024, arXiv:2405.18392): until then no rate depends on the length, so a run may become longer on its way.
    """
    optimizer, steps, warmup = config.optimizer, config.train.steps, config.warmup_steps
    peak = optimizer.learning_rate * optimizer.lr_multiplier
    if step < warmup:
        return peak * (step + 1) / warmup
    if (begins := config.decay_begins) is not None:
        left = 1 - _progress(step, begins, steps)
    else:
        left = 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, steps)))
    return peak * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * left)


def relengthened(step: int, config: Config, before: TrainConfig) -> str | None:
    """What to say at step `step` to a run of another length than `before` it had; None where that leaves the rate as it was."""
    old = dataclasses.replace(config, train=before)
    was, now = learning_rate(step, old), learning_rate(step, config)
    if was == now:
        return None
    lengths = f"{config.train.steps} steps instead of {before.steps}"
    said = f"{lengths} change the learning rate of step {step + 1} from {was:.3g} to {now:.3g}"
    if old.decay_begins is not None:
        said += (
            f"; its checkpoint of step {old.decay_begins}, by --resume in another --run-dir, is from before the decay"
        )
    return f"warning: {said}"


def _progress(step: int, begin: int, end: int) -> float:
    """0 up to `begin`, 1 from `end` on."""
    return min(1.0, max(0, step - begin) / max(1, end - begin))
