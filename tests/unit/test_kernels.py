"""The kernels for a GPU, without one: Triton compiles them, and its interpreter runs them on a CPU, beside torch's operators.

Triton decides when it is imported whether it interprets: so they run in a process of their own, in which this file is collected again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2hpc.config import ModelConfig
from gpt2hpc.model import fused_blocks, fused_loss
from gpt2hpc.model.gpt import GPT

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def off(own: Tensor, other: Tensor) -> float:
    """The difference by the other's norm."""
    return float((own.double() - other.double()).norm() / other.double().norm())


if not INTERPRETS:

    @pytest.fixture(autouse=True)
    def needs_triton() -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("the kernels' tests need triton, which is for Linux on x86-64")

    @pytest.mark.parametrize("capability", [80, 90])
    def test_the_kernels_compile_for_a_gpu(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """For Ampere and Hopper, and read and write 16 bytes at once, which a mask can prevent unseen."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from gpt2hpc.model import block_kernels, loss_kernel

        of_others = {"rows": "i32", "width": "i32", "targets": "*i64"}
        wide = {"BLOCK": 1024}
        for kernel, in_bf16, constants in (
            (block_kernels._add_norm, "added_p normed_p", {**wide, "WIDTH": 768, "EPS": 1e-5}),
            (block_kernels._add_norm_backward, "of_normed_p of_added_p", {**wide, "WIDTH": 768}),
            (block_kernels._side_by_side, "one_p two_p three_p whole_p", wide),
            (block_kernels._bias_gelu, "x_p out_p", wide),
            (block_kernels._bias_gelu_backward, "grad_p x_p of_x_p", wide),
            (loss_kernel._kernel, "logits", {"VOCABULARY": 50257, "ROWS": 50304, "BLOCK": loss_kernel.BLOCK}),
        ):
            types = {**of_others, **dict.fromkeys(in_bf16.split(), "*bf16"), **dict.fromkeys(constants, "constexpr")}
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
            aligned = {
                (place,): [["tt.divisibility", 16]]
                for place, kind in enumerate(signature.values())
                if kind != "constexpr"
            }
            source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
            assert made.asm["cubin"]
            for access in ("ld", "st"):
                assert re.search(rf"{access}\.global[\w.:]*\.v4\.", made.asm["ptx"]), (kernel, access)

    def test_the_kernels_in_tritons_interpreter() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout
        assert "skipped" not in done.stdout

else:
    from gpt2hpc.model import block_kernels, loss_kernel

    SHAPES = pytest.mark.parametrize(("rows", "width"), [(1, 768), (37, 48), (150, 33), (3, 1600)])
    DTYPES = pytest.mark.parametrize(
        ("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=["fp32", "bf16"]
    )

    @DTYPES
    @SHAPES
    def test_residual_addition_and_norm(rows: int, width: int, dtype: torch.dtype, close: float) -> None:
        """fp32 shows the mathematics; the interpreter cuts bf16 off where a GPU rounds."""
        torch.manual_seed(rows)
        x, of_total = torch.randn(rows, width), torch.randn(rows, width)
        added, of_normed = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
        its_bias, weight, bias = torch.randn(3, width)
        found = block_kernels.add_norm(x, added, its_bias, weight, bias, 1e-5)
        wanted = fused_blocks.add_norm(x, added, its_bias, weight, bias, 1e-5)
        assert [each.shape for each in found] == [each.shape for each in wanted]
        assert off(found[0], wanted[0]) < 1e-6
        assert off(found[1], wanted[1]) < close
        assert torch.allclose(found[2], wanted[2], atol=1e-6)
        assert off(found[3], wanted[3]) < 1e-5
        grads = block_kernels.add_norm_backward(of_total, of_normed, found[0], *found[2:], weight)
        expected = fused_blocks.add_norm_backward(of_total, of_normed, found[0], *found[2:], weight)
        assert off(grads[0], expected[0]) < 1e-6
        assert off(grads[1], expected[1]) < close
        for own, other in zip(grads[2], expected[2], strict=True):
            assert off(own, other) < close

    @DTYPES
    @SHAPES
    def test_three_side_by_side(rows: int, width: int, dtype: torch.dtype, close: float) -> None:
        torch.manual_seed(rows)
        parts = [torch.randn(rows, width).to(dtype) for _ in range(3)]
        whole, sums = block_kernels.side_by_side(*parts)
        assert torch.equal(whole, torch.cat(parts, dim=1))
        assert torch.allclose(sums, whole.float().sum(0), atol=1e-4)

    @DTYPES
    @pytest.mark.parametrize(("rows", "width"), [(2, 3072), (37, 48), (9, 1500)])
    def test_bias_and_gelu(rows: int, width: int, dtype: torch.dtype, close: float) -> None:
        torch.manual_seed(rows)
        x, grad, bias = 3 * torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
        x[0, :4] = torch.tensor([300.0, -300.0, -30.0, 1e-20])
        x, grad = x.to(dtype), grad.to(dtype)
        exact = (x.double() + bias).requires_grad_()
        F.gelu(exact, approximate="tanh").backward(grad.double())
        assert off(block_kernels.bias_gelu(x, bias), F.gelu(exact.detach(), approximate="tanh")) < close
        of_x, of_bias = block_kernels.bias_gelu_backward(grad, x, bias)
        assert off(of_x, exact.grad) < close
        assert torch.allclose(of_bias, of_x.sum(0, dtype=torch.float32), atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_a_model_by_all_of_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """The operators hand the kernels what they hand torch's operators; gradients of attention lie in another order."""
        shape = ModelConfig(n_layer=2, n_head=2, n_embd=48, block_size=16, vocab_size=250, padded_vocab_size=256)
        torch.manual_seed(1)
        plain, by_kernels = GPT(shape), GPT(shape)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        by_kernels.load_state_dict(plain.state_dict())
        by_kernels.fuse()
        monkeypatch.setattr(fused_loss, "by_kernel", lambda x: True)
        tokens, targets = torch.randint(0, 250, (2, 3, 16))
        losses = []
        for model in (plain, by_kernels):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(tokens, targets)
            loss.backward()
            losses.append(loss.detach())
        close = 1e-5 if dtype == torch.float32 else 3e-2
        assert torch.allclose(*losses, rtol=close / 10)
        for (name, one), other in zip(plain.named_parameters(), by_kernels.parameters(), strict=True):
            assert off(other.grad, one.grad) < close, name

    def test_tensors_that_lie_otherwise() -> None:
        torch.manual_seed(2)
        x, grad = torch.randn(24, 10).t(), torch.randn(24, 10).t()
        columns = [torch.randn(10, 72).chunk(3, dim=1)[part] for part in range(3)]
        weight = torch.randn(24)
        assert torch.equal(block_kernels.side_by_side(*columns)[0], torch.cat(columns, dim=1))
        assert torch.allclose(block_kernels.bias_gelu(x, weight), F.gelu(x + weight, approximate="tanh"), atol=1e-5)
        for wrapper, given in (
            (block_kernels.bias_gelu_backward, (grad, x, weight)),
            (block_kernels.add_norm, (x, grad, weight, weight, weight, 1e-5)),
            (block_kernels.add_norm_backward, (grad, x, grad, weight[:10], weight[:10], weight)),
        ):
            dense = [each.contiguous() if isinstance(each, Tensor) else each for each in given]
            for own, other in zip(wrapper(*given), wrapper(*dense), strict=True):
                assert torch.equal(own, other)

    @DTYPES
    @pytest.mark.parametrize(("vocabulary", "rows"), [(70, 80), (4990, 5056), (64, 64)])
    def test_a_loss_and_its_gradients_in_place(vocabulary: int, rows: int, dtype: torch.dtype, close: float) -> None:
        """One token does not count, another one's target does not exist, which the kernel takes alike."""
        torch.manual_seed(vocabulary)
        logits = (4 * torch.randn(9, rows)).to(dtype)
        targets = torch.randint(0, vocabulary, (9,))
        targets[3], targets[5] = fused_loss.IGNORED, rows + 7
        wanted, valid = logits.clone(), targets.clone()
        valid[5] = fused_loss.IGNORED
        losses = loss_kernel.losses_and_gradients_in_place(logits, targets, vocabulary)
        expected = fused_loss._losses(wanted, valid, vocabulary)
        assert off(losses, expected) < 1e-6
        assert off(logits, wanted) < close
        assert logits[3].count_nonzero() == logits[5].count_nonzero() == 0
        assert logits[:, vocabulary:].count_nonzero() == 0
