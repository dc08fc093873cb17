"""ZeRO, stage 1 (Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1): the optimizer's state is spread over the ranks.

Each rank steps with its share of the parameters only, so that the state of the others never comes to be there, and then tells its
peers the new weights. Gradients are DDP's, whole on every rank: the arithmetic is that of a step without it, bit for bit.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.shares import spread


class Share:
    """The parameters that this rank steps with. Works with every optimizer that passes over parameters without a gradient.

    Args:
        model: Whose parameters are spread, by their size in bytes.
        ranks: This process among its peers.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        parameters = dict(model.named_parameters())
        owners = spread({name: parameter.nbytes for name, parameter in parameters.items()}, ranks.world_size)
        self.names = frozenset(name for name, owner in owners.items() if owner == ranks.rank)
        self._others = [parameters[name] for name in parameters if name not in self.names]
        self._owned = [(parameters[name], owners[name]) for name in parameters]

    def drop_others(self) -> None:
        """Before a step, and after all gradients were looked at: the optimizer passes over those that others step with."""
        for parameter in self._others:
            parameter.grad = None

    def exchange(self) -> None:
        """After a step: every rank gets each parameter from its owner; collective."""
        under_way = [dist.broadcast(parameter.detach(), owner, async_op=True) for parameter, owner in self._owned]
        for each in under_way:
            each.wait()
