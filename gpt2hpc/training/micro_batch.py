"""`train.micro_batch_size: auto`: the largest micro batch that divides what a rank computes in a step, and fits into memory.

A model of its own takes steps of few sequences; what they need is measured, and what more would need follows by a straight line. On
CUDA the answer is then tried, and given up for the next smaller one where it does not fit. A CPU is not tried: who takes too much
there is killed and catches nothing. What is found is kept in RUN/micro-batch.json, and in each checkpoint for an empty disk, so that
the next attempt on as many ranks of the same kind takes the same one, to the same bytes. One that ran out of memory after all is
noted in RUN/micro-batch.json too, and not taken again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gpt2hpc import cli, durable
from gpt2hpc.cluster import host_memory
from gpt2hpc.config import Config
from gpt2hpc.config_rules import grad_accum_steps
from gpt2hpc.errors import ConfigError, Gpt2hpcError, PeerGoneError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import meters
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.footprint import Way, bytes_of_a_sequence
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.meters import CudaMeter, HostMeter, Meter, is_out_of_memory
from gpt2hpc.training.process_group import Ranks

SIZES_MEASURED = 3
_MENDS = "--train.activation_checkpointing true, --train.shard_optimizer true on several ranks, or a smaller model.block_size"


class MicroBatch:
    """What this attempt computes at once, and what becomes of it in RUN/micro-batch.json.

    Args:
        config: Settings of the run; the size is settled at once, which is collective.
        run: Where it is noted.
        ranks: This process among its peers.
        resumed: What the attempt goes on from.
        say: Prints a line; a no-op on ranks other than 0.
        beat: Called as the search gets on.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        ranks: Ranks,
        *,
        resumed: Checkpoint | None,
        say: Callable[[str], None],
        beat: Callable[[], object],
    ) -> None:
        self._run, self._ranks, self._resumed = run, ranks, resumed
        self._found: dict[str, Any] | None = None
        self.config = config
        """The settings with a number for `auto`."""
        if config.train.micro_batch_size == "auto":
            self._found = self._settled(config, say, beat)
            self.config = _with_rows(config, self._found["micro_batch_size"])

    @property
    def found(self) -> dict[str, Any] | None:
        """What was found, and in which situation, for a checkpoint; None where a number was given."""
        return self._found and {key: self._found[key] for key in ("micro_batch_size", "of")}

    def is_tried(self) -> None:
        """The first step is about to be taken; one that dies before `is_proven` has taken too much, on a CPU."""
        self._note("tried")

    def is_proven(self) -> None:
        """The first step is done."""
        self._note("proven")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """An error for lack of memory inside makes the next attempt take a smaller one; one of the user's says nothing of memory."""
        try:
            yield
        except PeerGoneError:
            raise
        except Gpt2hpcError:
            self._note("found")
            raise
        except Exception as error:
            if self._found is not None and is_out_of_memory(error):
                size = self._found["micro_batch_size"]
                cli.warn(f"out of memory with micro batches of {size}; the next attempt takes smaller ones")
                durable.publish_json(self._run.micro_batch, {**self._found, "state": "too large"})
            raise

    def _note(self, state: str) -> None:
        if self._found is not None and self._found["state"] != "proven":
            self._found["state"] = state
            if self._ranks.is_first and not self._is_refuted():
                durable.publish_json(self._run.micro_batch, self._found)

    def _is_refuted(self) -> bool:
        """Whether a peer has run out of memory meanwhile."""
        there = durable.read_json(self._run.micro_batch)
        return isinstance(there, dict) and there == {**(self._found or {}), "state": "too large"}

    def _settled(self, config: Config, say: Callable[[str], None], beat: Callable[[], object]) -> dict[str, Any]:
        """What is noted of the same situation, or else found anew."""
        of = _situation(config, self._ranks)
        noted = self._ranks.from_first(self._noted() if self._ranks.is_first else [])
        known = next((each for each in noted if each.get("of") == of), None)
        below: int | None = None
        if known is not None:
            size, state = known["micro_batch_size"], known["state"]
            died = state == "tried" and self._ranks.device.type == "cpu"
            if not died and state != "too large":
                say(f"micro batches of {size}, as found before")
                return dict(known)
            below = size
        size = self._search(config, below, say, beat)
        found: dict[str, Any] = {"micro_batch_size": size, "state": "found", "of": of}
        if self._ranks.is_first:
            durable.publish_json(self._run.micro_batch, found)
        return found

    def _noted(self) -> list[dict[str, Any]]:
        """In the run directory, and in the checkpoint, which may be all that there is."""
        saved = self._resumed.manifest().get("micro_batch") if self._resumed is not None else None
        noted = [durable.read_json(self._run.micro_batch), saved and {**saved, "state": "found"}]
        return [each for each in noted if isinstance(each, dict)]

    def _search(self, config: Config, below: int | None, say: Callable[[str], None], beat: Callable[[], object]) -> int:
        """The largest on which all ranks agree; ConfigError where not even one sequence fits."""
        most = grad_accum_steps(_with_rows(config, 1), world_size=self._ranks.world_size)
        sizes = [size for size in range(1, most + 1) if most % size == 0 and (below is None or size < below)]
        own: int | None = _largest_here(config, self._ranks, sizes, beat) if sizes else None
        told = self._ranks.gather(own)
        if None in told:
            raise ConfigError(
                f"train.micro_batch_size=auto: not even one sequence of model.block_size={config.model.block_size} fits into the "
                f"memory of rank {told.index(None)}; try {_MENDS}"
            )
        size: int = min(each for each in told if each is not None)
        say(f"micro batches of {size}: the largest that divides the {most} sequences of a rank and fits on all of them")
        return size


def largest(sizes: Sequence[int], meter: Meter, step: Callable[[int], object], *, least_slope: int = 0) -> int | None:
    """The largest of `sizes`, smallest first, of which `step` fits; None where the first does not.

    `least_slope` is what a sequence more takes at least, in bytes: where little is measured, noise may hide it.
    """
    measured: dict[int, int] = {}

    def fits(size: int) -> bool:
        peak = meter.peak_bytes(lambda: step(size))
        if peak is None or peak > meter.limit_bytes:
            return False
        measured[size] = peak
        return True

    def seems_to_fit(size: int) -> bool:
        first, last = min(measured), max(measured)
        slope = max(least_slope, (measured[last] - measured[first]) // max(1, last - first))
        return measured[last] + slope * (size - last) <= meter.limit_bytes

    if not fits(sizes[0]):
        return None
    for size in sizes[1:SIZES_MEASURED]:
        if not seems_to_fit(size) or not fits(size):
            return max(measured)
    for size in reversed([each for each in sizes[SIZES_MEASURED:] if seems_to_fit(each)]):
        if not meter.proves or fits(size):
            return size
    return max(measured)


def _largest_here(config: Config, ranks: Ranks, sizes: Sequence[int], beat: Callable[[], object]) -> int | None:
    """On this rank alone, not compiled, which needs more; but with the operators that a compiled step has."""
    meter = _meter(config, ranks)
    trial: Learner | None = None

    def step(size: int) -> None:
        nonlocal trial
        if trial is None:
            trial = Learner(_with_rows(config, 1), ranks, beat)
            trial.rehearse(1)  # so that the optimizer has its state
        trial.rehearse(size)
        beat()

    way = Way(ranks=ranks.world_size, sixteen_bits=False, recomputes=config.train.activation_checkpointing)
    slope = 0 if meter.proves else bytes_of_a_sequence(config.model, way)
    try:
        return largest(sizes, meter, step, least_slope=slope)
    finally:
        trial = None
        meters.free(ranks.device)


def _meter(config: Config, ranks: Ranks) -> Meter:
    if ranks.device.type == "cuda":
        meters.free(ranks.device)
        return CudaMeter(ranks.device)
    ranks.barrier()  # so that none has begun to take memory when another looks
    available = host_memory.available_bytes() if ranks.device.type == "cpu" else None
    ranks.barrier()
    if available is None:
        raise ConfigError(
            f"train.micro_batch_size=auto is for CUDA, and for CPUs under Linux; on {ranks.device.type} here, give a number"
        )
    copy = config.state_bytes // ranks.world_size
    return HostMeter(available, sharers=ranks.env.local_world_size, kept_bytes=copy)


def _situation(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What the memory depends on, beside the settings that a run cannot change; collective."""
    device = ranks.device
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    train = config.train
    return {
        "world_size": ranks.world_size,
        "devices": sorted(set(ranks.gather(own))),
        "tokens_per_step": train.tokens_per_step,
        "precision": train.precision,
        "compile": train.compile,
        "cuda_graphs": train.cuda_graphs,
        "activation_checkpointing": train.activation_checkpointing,
        "shard_optimizer": train.shard_optimizer,
    }


def _with_rows(config: Config, rows: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=rows))
