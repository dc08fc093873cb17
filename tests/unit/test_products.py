"""Linear layers as a CPU computes them fast: torch's values and gradients, and an operator that compiles."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2hpc.config import ModelConfig
from gpt2hpc.model import products
from gpt2hpc.model.gpt import GPT
from gpt2hpc.model.products import linear

CLOSE = 1e-5
pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN here"
)


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU where MKL is as fast, and for shapes as small as these."""
    monkeypatch.setattr(products, "MKL_IS_NARROW", True)
    monkeypatch.setattr(products, "SMALL", 0)


def made(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients of something that is not the same for all of its elements."""
    value = function(*inputs)
    weights = torch.arange(value.numel(), dtype=torch.float32).sin().view(value.shape)
    return [value, *torch.autograd.grad((value * weights).sum(), inputs)]


@pytest.mark.parametrize("lead", [(40,), (3, 17), (2, 3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_torchs(lead: tuple[int, ...], bias: bool) -> None:
    inputs = made((*lead, 24), (36, 24), *([(36,)] if bias else []))
    for ours, torchs in zip(gradients(linear, inputs), gradients(F.linear, inputs), strict=True):
        assert ours.shape == torchs.shape
        assert torch.allclose(ours, torchs, atol=CLOSE, rtol=CLOSE)


def test_the_operator_is_used_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    [many, few, weight] = made((64, 24), (2, 24), (36, 24))
    names = [str(linear(each, weight).grad_fn) for each in (many, few)]
    assert "gpt2hpc" in names[0], names
    assert "gpt2hpc" not in names[1], "few rows"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(many, weight).dtype == torch.bfloat16
    assert "gpt2hpc" not in str(linear(many.double(), weight.double()).grad_fn)
    monkeypatch.setattr(products, "SMALL", many.numel() * weight.shape[0] + 1)
    assert "gpt2hpc" not in str(linear(many, weight).grad_fn), "a small product"
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "MKL_IS_NARROW", False)
    assert "gpt2hpc" not in str(linear(many, weight).grad_fn)


def test_only_gradients_that_are_wanted_are_computed() -> None:
    [x, weight, bias] = made((64, 24), (36, 24), (36,))
    x.requires_grad_(False)
    linear(x, weight, bias).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_the_operator_keeps_torchs_rules() -> None:
    torch.library.opcheck(torch.ops.gpt2hpc.linear.default, (*made((40, 24), (36, 24)), None))
    torch.library.opcheck(torch.ops.gpt2hpc.linear.default, tuple(made((2, 20, 24), (36, 24), (36,))))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++, which this machine lacks")
def test_a_model_compiles_as_one_graph() -> None:
    torch.manual_seed(1)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=61, padded_vocab_size=64))
    tokens = torch.randint(61, (4, 17))
    compiled = torch.compile(model, fullgraph=True)
    for called in (model, compiled):
        called(tokens[:, :-1], tokens[:, 1:]).backward()
    eager = model(tokens[:, :-1], tokens[:, 1:])
    assert torch.allclose(compiled(tokens[:, :-1], tokens[:, 1:]), eager, atol=CLOSE)
