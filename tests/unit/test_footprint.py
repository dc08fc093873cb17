"""The memory that is foretold, beside what torch allocates: every byte of a step, by its own profiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gpt2hpc import config_io
from gpt2hpc.config import ModelConfig, OptimizerConfig, OptimizerName
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import shares
from gpt2hpc.training.footprint import Way, bytes_of_a_sequence, footprint, most_fitting, parameter_sizes
from gpt2hpc.training.optimizer import new_optimizer
from tests.peaks import Step

SHAPE = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=500, padded_vocab_size=512)
TOLERANCE = 0.05


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("sixteen_bits", [False, True], ids=["fp32", "bf16"])
def test_a_step_allocates_what_is_foretold(sixteen_bits: bool, recomputes: bool, micro_batch: int) -> None:
    told = footprint(SHAPE, Way(sixteen_bits=sixteen_bits, recomputes=recomputes), micro_batch=micro_batch)
    step = Step(SHAPE, sixteen_bits=sixteen_bits, recomputes=recomputes)
    assert step.peak_bytes(micro_batch) == pytest.approx(told.casts + told.activations + told.head, rel=TOLERANCE)


@pytest.mark.parametrize("sixteen_bits", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [2, 16])
def test_a_block_computed_again_is_foretold(rows: int, sixteen_bits: bool) -> None:
    """Where the head takes little: with few tokens for the model's width, and with many."""
    shape = dataclasses.replace(SHAPE, n_layer=4, block_size=256, vocab_size=60, padded_vocab_size=64)
    told = footprint(shape, Way(sixteen_bits=sixteen_bits, recomputes=True), micro_batch=rows)
    peak = Step(shape, sixteen_bits=sixteen_bits, recomputes=True).peak_bytes(rows)
    assert peak == pytest.approx(told.casts + told.activations + told.head, rel=TOLERANCE)


def test_recomputing_keeps_little() -> None:
    """What the saved tensors hold between forward and backward: of each block its input only."""
    kept, recomputed = (Step(SHAPE, recomputes=each).saved_bytes(4) for each in (False, True))
    tokens, width = 4 * SHAPE.block_size, SHAPE.n_embd
    gone = SHAPE.n_layer * tokens * (60 * width + 4 * SHAPE.n_head + 16)
    assert kept - recomputed == pytest.approx(gone, rel=0.02)


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_state(optimizer_name: OptimizerName) -> None:
    model = GPT(SHAPE)
    optimizer = new_optimizer(model, OptimizerConfig(name=optimizer_name))
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    optimizer.step()
    told = footprint(SHAPE, Way(muon=optimizer_name == "muon"), micro_batch=1)
    parameters = dict(model.named_parameters())
    assert parameter_sizes(SHAPE) == {name: parameter.numel() for name, parameter in parameters.items()}
    assert told.weights == sum(each.nbytes for each in parameters.values())
    assert told.gradients == sum(each.grad.nbytes for each in parameters.values() if each.grad is not None)
    held = sum(value.nbytes for kinds in optimizer.state.values() for value in kinds.values())
    steps = sum("step" in kinds for kinds in optimizer.state.values())
    assert held - told.optimizer == 4 * steps, "a counter each, of AdamW's"


def test_share_of_the_optimizer() -> None:
    owners = shares.spread(parameter_sizes(SHAPE), 3)
    sizes = [sum(size for name, size in parameter_sizes(SHAPE).items() if owners[name] == rank) for rank in range(3)]
    assert footprint(SHAPE, Way(ranks=3, shards=True), micro_batch=1).optimizer == 8 * max(sizes)
    assert max(sizes) < 0.4 * sum(sizes)
    assert footprint(SHAPE, Way(ranks=1, shards=True), micro_batch=1).optimizer == 8 * sum(sizes)


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_most_that_fits(recomputes: bool) -> None:
    model = config_io.load(config_io.presets()["gpt2-774m"]).model
    way = Way(recomputes=recomputes)
    most = most_fitting(model, way, memory_bytes=80e9)
    assert footprint(model, way, micro_batch=most).total <= 80e9 < footprint(model, way, micro_batch=most + 1).total
    assert most_fitting(model, way, memory_bytes=10e9) == 0
    more = footprint(model, way, micro_batch=100).total - footprint(model, way, micro_batch=99).total
    assert bytes_of_a_sequence(model, way) == more


def test_the_largest_on_cards_of_40_gb() -> None:
    """What it is all for: by hand, 24.9 GB of state, 3.1 of weights in 16 bits, and what a sequence takes."""
    model = config_io.load(config_io.presets()["gpt2-1558m"]).model
    plain = footprint(model, Way(), micro_batch=2)
    assert (plain.weights + plain.gradients + plain.optimizer) / 1e9 == pytest.approx(24.92, abs=0.01)
    assert plain.activations / 1e9 == pytest.approx(2 * 1024 * 48 * (36 * 1600 + 116) / 1e9, rel=0.01)
    assert plain.head == 12 * 2 * 1024 * 50_304
    both = dataclasses.replace(Way(ranks=8), recomputes=True, shards=True)
    assert [most_fitting(model, way, memory_bytes=0.92 * 40e9) for way in (Way(), both)] == [2, 23]


def test_muon_keeps_one_moment_of_what_it_steps_with() -> None:
    model = ModelConfig(n_layer=3, n_head=2, n_embd=64)
    plain, muon = (footprint(model, Way(muon=muon), micro_batch=1) for muon in (False, True))
    assert plain.optimizer - muon.optimizer == 4 * model.inner_parameters
    shared = footprint(model, Way(ranks=2, shards=True, muon=True), micro_batch=1)
    assert muon.optimizer / 2 <= shared.optimizer < muon.optimizer
