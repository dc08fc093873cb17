from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from gpt2hpc import config_io
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from gpt2hpc.model import fit, fused_blocks, fused_loss, hf_weights
from gpt2hpc.model.generate import generate
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import precision, state
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.optimizer import new_optimizer
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.schedule import learning_rate, relengthened
from gpt2hpc.trials import step
from gpt2hpc.trials.bench import Bench, TrialError
from tests.published import published

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=250, padded_vocab_size=256)
SHAPES = ["gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m"]


def copy_weights(theirs: torch.nn.Module, ours: GPT) -> None:
    weights = fit.fitted(hf_weights.from_state_dict(theirs.state_dict()), ours.config, ours.config, source="theirs")
    state.load_model(ours, weights.items())


@pytest.mark.parametrize("preset", SHAPES)
def test_logits_equal_transformers(preset: str) -> None:
    """The four published shapes in full width and depth, fp32, to 1e-4."""
    config = config_io.load(config_io.presets()[preset]).model
    theirs = published(config)
    with torch.device("meta"):
        ours = GPT(config)
    ours = ours.to_empty(device="cpu").eval()
    copy_weights(theirs, ours)
    tokens = torch.randint(0, config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = ours(tokens), theirs(tokens).logits
    assert logits.shape == (1, 24, config.padded_vocab_size)
    assert torch.allclose(logits[..., : config.vocab_size], expected, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in theirs.parameters()) == config.parameters


def test_gradients_equal_transformers() -> None:
    theirs, ours = published(SMALL), GPT(SMALL)
    copy_weights(theirs, ours)
    tokens = torch.randint(0, 250, (3, 17))
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    expected = F.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    expected.backward()
    own, their = ours.h[1].mlp.c_fc.weight.grad, theirs.transformer.h[1].mlp.c_fc.weight.grad.t()
    assert torch.allclose(own, their, atol=1e-6)
    assert torch.allclose(ours.wte.weight.grad[:250], theirs.transformer.wte.weight.grad, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sixteen_bits", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fused_operators_compute_what_torchs_do(
    reduction: str, sixteen_bits: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and its gradients, scaled by what follows it, with targets that do not count and a last piece that is smaller."""
    if compiled and shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs g++, which this machine lacks")
    monkeypatch.setattr(fused_loss, "PIECE", 10)
    whole, fused = GPT(SMALL), GPT(SMALL)
    with torch.no_grad():
        for parameter in whole.parameters():  # biases too, which begin as zeros
            parameter += 0.02 * torch.randn_like(parameter)
    fused.load_state_dict(whole.state_dict())
    fused.fuse()
    if compiled:
        torch._dynamo.reset()
        fused.compile()
    tokens, targets = torch.randint(0, 250, (3, 16)), torch.randint(0, 250, (3, 16))
    targets[1, 3:] = -100
    losses = []
    for model in (whole, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=sixteen_bits):
            loss = model(tokens, targets, reduction)
            with torch.no_grad():
                assert torch.allclose(model(tokens, targets, reduction), loss)
        (0.5 * loss).backward()
        losses.append(loss.detach())
    assert torch.allclose(*losses, rtol=1e-3 if sixteen_bits else 1e-6)
    for (name, one), other in zip(whole.named_parameters(), fused.parameters(), strict=True):
        assert (one.grad - other.grad).norm() < (2e-2 if sixteen_bits else 1e-5) * one.grad.norm(), name
    assert torch.all(fused.wte.weight.grad[250:] == 0)


def test_where_blocks_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with dropout, nor where blocks are computed again, nor with a mask or a cache, as in generating."""
    genuine, calls = fused_blocks.through, []

    def through(*given: Any) -> torch.Tensor:
        calls.append(1)
        return genuine(*given)

    monkeypatch.setattr(fused_blocks, "through", through)
    tokens = torch.randint(0, 250, (2, 8))
    dropping = dataclasses.replace(SMALL, dropout=0.5)
    for model, in_training in ((GPT(SMALL), 1), (GPT(dropping), 0), (GPT(SMALL, recomputes=True), 0)):
        model(tokens, tokens)
        assert not calls
        model.fuse()
        model(tokens, tokens)
        assert len(calls) == in_training
        calls.clear()
        model.eval()
        model(tokens, tokens)
        assert len(calls) == 1
        calls.clear()
    model.hidden(tokens, mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))
    assert not calls


def test_fused_operators_are_compiled_for_any_number_of_rows() -> None:
    """Once for the first, once for all others, as torch's are."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    model = GPT(SMALL)
    model.fuse()
    compiled = torch.compile(model, backend=backend)
    for rows in (2, 3, 4, 5):
        tokens = torch.randint(0, 250, (rows, 8))
        compiled(tokens, tokens).backward()
    assert len(graphs) == 2


def test_a_fused_loss_adds_up_its_weight_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand pieces lose no more than one: sums in bf16 would stand still long before."""
    monkeypatch.setattr(fused_loss, "PIECE", 1)
    hidden, targets = torch.ones(1000, 8, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64)
    weight = torch.zeros(2, 8, requires_grad=True)
    fused_loss.fused_loss(hidden, weight, targets, vocabulary=2).backward()
    assert torch.equal(weight.grad, torch.tensor([[-500.0], [500.0]]).expand(2, 8))


def test_a_compiled_step_on_several_threads_is_the_same_each_time() -> None:
    """Many tokens are the same here, and threads would add up their gradients in any order."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs g++, which this machine lacks")
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        model = GPT(dataclasses.replace(SMALL, n_layer=1))
        plain = GPT(dataclasses.replace(SMALL, n_layer=1))
        plain.load_state_dict(model.state_dict())
        model.compile()
        tokens = torch.randint(0, 5, (64, 16))
        plain(tokens, tokens).backward()
        found = []
        for _ in range(50):
            model.zero_grad()
            model(tokens, tokens).backward()
            found.append(model.wte.weight.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], each) for each in found)
    assert torch.allclose(found[0], plain.wte.weight.grad, atol=1e-6)


def test_where_a_loss_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for capability, suits in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fused_loss.suits(torch.device("cuda"), torch.bfloat16) is suits
    assert not fused_loss.suits(torch.device("cuda"), torch.float32)
    assert not fused_loss.suits(torch.device("cuda"), torch.float16)
    assert not fused_loss.suits(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not fused_loss.suits(torch.device("cuda"), torch.bfloat16)


def test_a_fused_loss_is_tried_on_the_machine_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trial of `gpt2hpc selftest`; here of the operator as a CPU computes it."""
    bench = Bench("cpu", tmp_path, 0)
    assert "fused" not in step.run(bench)
    monkeypatch.setattr(fused_loss, "suits", lambda device, dtype: True)
    assert step.run(bench).endswith("; the same with fused operators")
    genuine = fused_loss._losses

    def wrong(logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> torch.Tensor:
        losses = genuine(logits, targets, vocabulary)
        logits[:, 0] += 0.1
        return losses

    monkeypatch.setattr(fused_loss, "_losses", wrong)
    with pytest.raises(TrialError, match=r"give wte\.weight another gradient"):
        step.run(bench)
    monkeypatch.setattr(fused_loss, "_losses", genuine)
    nearly = fused_blocks._add_norm
    with monkeypatch.context() as context:
        context.setattr(
            fused_blocks, "_add_norm", lambda x, added, *more: nearly(x, added and (added[0], 0 * added[1]), *more)
        )
        with pytest.raises(TrialError, match=r"by fused operators the loss|give .* another gradient"):
            step.run(bench)
    monkeypatch.setattr(fused_loss, "_losses", lambda *of: genuine(*of) + 0.1)
    with pytest.raises(TrialError, match=r"by fused operators the loss is 7\.53\d+, and 7\.43"):
        step.run(bench)


@pytest.mark.parametrize(
    ("rows", "replayed", "compiles", "fused"),
    [
        (32, False, True, (True, True)),
        (16, False, True, (True, False)),
        (1, True, True, (True, True)),
        (32, False, False, (False, False)),
    ],
)
def test_blocks_are_fused_from_a_size_on_and_where_graphs_replay_them(
    rows: int, replayed: bool, compiles: bool, fused: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "suits", lambda *of: True)
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=768, vocab_size=250, padded_vocab_size=256)
    train = TrainConfig(micro_batch_size=rows, tokens_per_step=1024 * rows, compile=compiles, cuda_graphs=replayed)
    learner = Learner(Config(model=shape, train=train), Ranks(DistEnv.from_env({}), torch.device("cpu")), lambda: None)
    assert (learner.model.fuses_loss, learner.model.fuses_blocks) == fused


@pytest.mark.parametrize("replayed", [False, True])
def test_gradients_stay_where_graphs_do_not_write(replayed: bool) -> None:
    """With CUDA graphs they are the same memory from the warm-up on, and zero between steps; else they are freed."""
    train = TrainConfig(micro_batch_size=1, tokens_per_step=32, total_steps=4, device="cpu", cuda_graphs=replayed)
    config = Config(model=SMALL, train=train, optimizer=OptimizerConfig(warmup_tokens=0))
    learner = Learner(config, Ranks(DistEnv.from_env({}), torch.device("cpu")), lambda: None)
    learner.wrap()
    learner.warm_up()
    places = []
    for number in range(2):
        learner.learn([(torch.randint(0, 250, (1, 16)), torch.randint(0, 250, (1, 16))) for _ in range(2)], number)
        gradients = [parameter.grad for parameter in learner.model.parameters()]
        assert all(each is not None and not each.any() if replayed else each is None for each in gradients)
        places.append([each.data_ptr() for each in gradients if each is not None])
    assert places[0] == places[1]


def test_padding_is_impossible() -> None:
    model = GPT(SMALL)
    with torch.no_grad():
        model.wte.weight[250:] = 100.0
    logits = model(torch.randint(0, 250, (2, 16)))
    assert torch.all(logits[..., 250:] == -math.inf)
    assert torch.isfinite(logits[..., :250]).all()
    loss = model(torch.randint(0, 250, (2, 16)), torch.randint(0, 250, (2, 16)))
    loss.backward()
    assert torch.isfinite(model.wte.weight.grad).all()
    assert torch.all(model.wte.weight.grad[250:] == 0)
    drawn = list(generate(model, [1], max_tokens=300, temperature=5.0, seed=3))
    assert len(drawn) == 300
    assert max(drawn) < 250


def test_attention_is_causal() -> None:
    model = GPT(SMALL).eval()
    tokens = torch.randint(0, 250, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 7
    with torch.no_grad():
        assert torch.equal(model(tokens)[0, :10, :250], model(changed)[0, :10, :250])


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=256, block_size=64, vocab_size=1000, padded_vocab_size=1024))
    scaled = 0.02 / math.sqrt(2 * 8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif "ln_" in name:
            assert torch.all(parameter == 1), name
        else:
            expected = scaled if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
    loss = model(torch.randint(0, 1000, (4, 64)), torch.randint(0, 1000, (4, 64)))
    assert loss.item() == pytest.approx(math.log(1000), abs=0.15)


def test_embedding_is_the_head() -> None:
    model = GPT(SMALL)
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]
    assert sum(p.numel() for p in model.parameters()) == SMALL.parameters + 6 * SMALL.n_embd


def test_ignored_targets_do_not_count() -> None:
    model = GPT(SMALL).eval()
    tokens = torch.randint(0, 250, (2, 16))
    targets = torch.randint(0, 250, (2, 16))
    alone = model(tokens[:1], targets[:1], reduction="sum")
    targets[1:] = -100
    assert torch.allclose(model(tokens, targets, reduction="sum"), alone)


def test_generation_is_repeatable() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL)
    one, two, other = (list(generate(model, [1, 2], max_tokens=30, seed=seed)) for seed in (5, 5, 6))
    assert one == two != other
    greedy = list(generate(model, [1, 2], max_tokens=30, temperature=0))
    assert greedy == list(generate(model, [1, 2], max_tokens=30, temperature=1.0, top_k=1))
    stop = greedy[4]
    assert list(generate(model, [1, 2], max_tokens=30, temperature=0, stop=stop)) == greedy[: greedy.index(stop)]


def test_decay_is_on_matrices_only() -> None:
    model = GPT(SMALL)
    decayed, plain = new_optimizer(model, OptimizerConfig()).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(name.endswith("weight") and "ln_" not in name for name in (names[p] for p in decayed["params"]))
    assert all(name.endswith("bias") or "ln_" in name for name in (names[p] for p in plain["params"]))
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_schedule() -> None:
    config = Config(
        optimizer=OptimizerConfig(learning_rate=6e-4, lr_multiplier=2.0, warmup_tokens=1000),
        train=TrainConfig(total_steps=110, tokens_per_step=100, micro_batch_size=1),
    )
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[0] == pytest.approx(1.2e-4)
    assert rates[9] == rates[10] == pytest.approx(1.2e-3)
    assert rates[60] == pytest.approx(1.2e-3 * 0.55)
    assert rates[110] == pytest.approx(1.2e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def wsd(steps: int, **optimizer: float) -> Config:
    return Config(
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_tokens=1000, schedule="wsd", **optimizer),
        train=TrainConfig(total_steps=steps, tokens_per_step=100, micro_batch_size=1),
    )


def test_warmup_stable_decay() -> None:
    config = wsd(110, decay_share=0.2)
    rates = [learning_rate(step, config) for step in range(111)]
    assert config.decay_begins == 88
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9:89] == [1e-3] * 80
    assert rates[99] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert rates[110] == pytest.approx(1e-4)
    assert rates[88:] == sorted(set(rates[88:]), reverse=True)
    assert learning_rate(200, config) == rates[110]


def test_a_longer_run_has_the_same_rates_until_the_decay_of_the_shorter() -> None:
    short, long = wsd(110), wsd(1100)
    assert short.decay_begins == 88
    assert all(learning_rate(step, short) == learning_rate(step, long) for step in range(89))
    assert relengthened(88, long, short.train) is None
    said = relengthened(99, long, short.train)
    assert said
    assert "1100 steps instead of 110" in said
    assert "of step 100 from 0.00055 to 0.001" in said
    assert "checkpoint of step 88" in said


def test_precision_is_what_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:3")
    assert precision.choose("auto", cpu).dtype == torch.float32
    for capability, dtype in (
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert precision.choose("auto", gpu).dtype == dtype, "an indexed device counts as CUDA, and Ampere has bf16"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert precision.peak_flops(gpu) == 989e12
    assert precision.peak_flops(cpu) is None


def test_scaling_is_for_fp16_only() -> None:
    cpu = torch.device("cpu")
    assert precision.choose("fp16", cpu).new_scaler().is_enabled()
    for name in ("bf16", "fp32"):
        assert not precision.choose(name, cpu).new_scaler().is_enabled()


def test_flops_per_token() -> None:
    """6N + 12·L·d·T; 124M: 0.86 GFLOPs."""
    assert ModelConfig().flops_per_token == 6 * 124_439_808 + 12 * 12 * 768 * 1024
