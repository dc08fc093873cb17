"""What updates the parameters: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gpt2hpc.config import OptimizerConfig
from gpt2hpc.training.footprint import is_inner_matrix


def new_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """With weight decay on the weights with two or more dimensions only, so not on biases and layer norms."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inner = {name: named.pop(name) for name in list(named) if config.name == "muon" and is_inner_matrix(name)}
    peak, rest = config.learning_rate * config.lr_multiplier, list(named.values())
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=peak, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    if not inner:
        return adamw
    muon = Muon(
        [
            {"params": [p for name, p in inner.items() if (name.endswith(QKV)) == fused], "pieces": 3 if fused else 1}
            for fused in (True, False)
        ],
        lr=peak,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together([muon, adamw])


QKV = "attn.c_attn.weight"
"""Queries, keys and values: three matrices, one below the other."""


def state_kinds(group: dict[str, Any]) -> frozenset[str]:
    """What the optimizer of this group keeps of each parameter, once it has taken a step."""
    return frozenset({"momentum_buffer"} if "momentum" in group else {"step", "exp_avg", "exp_avg_sq"})


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024; arXiv:2502.16982), but a matrix may be several: `pieces` of a group says of how many, one
    below the other, each of its matrices is made. Each is made orthogonal by itself, and its state is still one tensor.

    Queries, keys and values are three maps: in one piece, what is large in one of them would leave little to the others. The first
    Muons for GPT-2 split them too (KellerJordan/modded-nanogpt). bench/optimizers.py has it both ways.
    """

    def _init_group(
        self, group: Any, params_with_grad: list[Tensor], grads: list[Tensor], muon_momentum_bufs: list[Tensor]
    ) -> bool:
        whole: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        is_complex: bool = super()._init_group(group, *whole)
        for pieces, tensors in zip((params_with_grad, grads, muon_momentum_bufs), whole, strict=True):
            pieces += [
                piece for tensor in tensors for piece in tensor.chunk(group["pieces"])
            ]  # views: updated in place
        return is_complex


class Together(Optimizer):
    """Several optimizers as one: their groups, one after the other, and one state."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = [(part, len(part.param_groups)) for part in parts]
        self._share()

    def _share(self) -> None:
        """Let the parts work on this one's groups and state."""
        begin = 0
        for part, count in self._parts:
            part.state, part.param_groups = self.state, self.param_groups[begin : begin + count]
            begin += count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part, _ in self._parts:
            part.step()
