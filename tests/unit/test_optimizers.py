"""Muon for the matrices inside the blocks, AdamW for the rest, as one optimizer; and what a checkpoint of it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gpt2hpc.config import Config, ModelConfig, OptimizerConfig
from gpt2hpc.errors import ConfigError
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import state
from gpt2hpc.training.optimizer import QKV, new_optimizer

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50, padded_vocab_size=50)
MUON, ADAMW = (OptimizerConfig(name=name, learning_rate=1e-2) for name in ("muon", "adamw"))


def model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(SMALL)


def learn(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_of(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.state_tensors(model, optimizer).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_muon_has_the_matrices_inside_the_blocks() -> None:
    gpt = model()
    learn(gpt, optimizer := new_optimizer(gpt, MUON), range(1))
    names = {parameter: name for name, parameter in gpt.named_parameters()}
    kinds = {names[parameter]: set(kept) for parameter, kept in optimizer.state.items()}
    inner = {name for name, kept in kinds.items() if kept == {"momentum_buffer"}}
    assert inner == {
        f"h.{block}.{matrix}.weight"
        for block in range(2)
        for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {frozenset(kept) for name, kept in kinds.items() if name not in inner} == {
        frozenset({"step", "exp_avg", "exp_avg_sq"})
    }
    assert kinds.keys() == set(names.values())
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0.1} == inner | {"wte.weight", "wpe.weight"}


def test_each_part_is_torchs() -> None:
    """Queries, keys and values as three matrices, each other one as it is; the rest as AdamW alone has it."""
    ours, theirs = model(), model()
    optimizer = new_optimizer(ours, MUON)
    matrices, rest = {}, []
    for name, parameter in theirs.named_parameters():
        if parameter.dim() < 2 or not name.startswith("h."):
            rest.append(parameter)
        elif name.endswith(QKV):
            matrices[name] = [torch.nn.Parameter(part.detach().clone()) for part in parameter.split(SMALL.n_embd)]
        else:
            matrices[name] = [torch.nn.Parameter(parameter.detach().clone())]
    groups = [{"params": [p for p in rest if (p.dim() > 1) == decayed]} for decayed in (True, False)]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    muon = torch.optim.Muon(
        [p for pieces in matrices.values() for p in pieces], lr=1e-2, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        learn(ours, optimizer, range(step, step + 1))
        tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(step))
        theirs(tokens[:, :-1], tokens[:, 1:]).backward()
        named = dict(theirs.named_parameters())
        for name, pieces in matrices.items():
            gradient = named[name].grad
            assert gradient is not None
            for piece, part in zip(pieces, gradient.chunk(len(pieces)), strict=True):
                piece.grad = part.clone()
        muon.step()
        adamw.step()
        with torch.no_grad():
            for name, pieces in matrices.items():
                named[name].copy_(torch.cat([piece.detach() for piece in pieces]))
        theirs.zero_grad()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_updates_are_of_adamws_size() -> None:
    """arXiv:2502.16982, section 2.2: a root mean square of 0.2 and so, before the learning rate."""
    gpt = model()
    before = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
    plain = OptimizerConfig(name="muon", learning_rate=1.0, weight_decay=0.0)
    learn(gpt, new_optimizer(gpt, plain), range(1))
    for name, parameter in gpt.named_parameters():
        if name.startswith("h.") and parameter.dim() == 2:
            assert 0.13 < (parameter.detach() - before[name]).square().mean().sqrt() < 0.27, name


@pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])
def test_saved_and_loaded_it_goes_on_with_the_same_bits(config: OptimizerConfig) -> None:
    whole, begun, resumed = model(), model(), model(seed=1)
    learn(whole, one := new_optimizer(whole, config), range(5))
    learn(begun, two := new_optimizer(begun, config), range(3))
    saved = tensors_of(begun, two)
    three = new_optimizer(resumed, config)
    state.load_model(resumed, [(name, tensor) for name, tensor in saved.items() if name.startswith("model/")])
    state.load_optimizer(three, resumed, [(k, v) for k, v in saved.items() if k.startswith("optimizer/")])
    learn(resumed, three, range(3, 5))
    assert same(tensors_of(resumed, three), tensors_of(whole, one))


@pytest.mark.parametrize(("there", "here"), [(MUON, ADAMW), (ADAMW, MUON)], ids=["muon to adamw", "adamw to muon"])
def test_the_state_of_the_other_optimizer_is_refused(there: OptimizerConfig, here: OptimizerConfig) -> None:
    gpt = model()
    learn(gpt, optimizer := new_optimizer(gpt, there), range(1))
    saved = [(name, tensor) for name, tensor in tensors_of(gpt, optimizer).items() if name.startswith("optimizer/")]
    with pytest.raises(ConfigError, match=r"is of another optimizer: of h\.0\.attn\.c_attn\.weight it holds") as caught:
        state.load_optimizer(new_optimizer(gpt, here), gpt, saved)
    assert "momentum_buffer" in caught.value.line
    assert "exp_avg, exp_avg_sq, step" in caught.value.line
    assert "\n" not in caught.value.line


@pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])
def test_a_loss_scale_that_overflows_skips_the_step(config: OptimizerConfig) -> None:
    gpt = model()
    optimizer, scaler = new_optimizer(gpt, config), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tokens = torch.randint(0, 50, (4, 9))
    taken = []
    for overflows in (False, True, False):
        before = copy.deepcopy(tensors_of(gpt, optimizer))
        scaler.scale(gpt(tokens[:, :-1], tokens[:, 1:])).backward()
        if overflows:
            gpt.h[0].mlp.c_fc.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(not same(before, tensors_of(gpt, optimizer)))
    assert taken == [True, False, True]


@pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])
def test_the_bytes_of_a_checkpoint_are_foretold(config: OptimizerConfig) -> None:
    gpt = model()
    learn(gpt, optimizer := new_optimizer(gpt, config), range(1))
    held = sum(tensor.nbytes for tensor in tensors_of(gpt, optimizer).values())
    assert Config(model=SMALL, optimizer=config).state_bytes == pytest.approx(held, rel=0.01)
