"""The model and how it learns: micro batches forward and backward, gradients reduced once and clipped, then an update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2hpc.config import Config
from gpt2hpc.config_rules import grad_accum_steps
from gpt2hpc.model import fused_blocks, fused_loss
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import precision, state
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.optimizer import new_optimizer, state_kinds
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.reduction import mean_in_bf16
from gpt2hpc.training.schedule import learning_rate
from gpt2hpc.training.sharding import Share


class Learner:
    """Every rank has one, and calls it at the same steps.

    Args:
        config: Settings of the run; the model begins with random weights by their seed.
        ranks: This process among its peers.
        beat: Called as it gets on: at each micro batch, and at each tensor that is loaded.
    """

    def __init__(self, config: Config, ranks: Ranks, beat: Callable[[], object]) -> None:
        self._config, self._ranks, self._beat = config, ranks, beat
        self.precision = precision.choose(config.train.precision, ranks.device)
        self._scaler = self.precision.new_scaler()
        torch.manual_seed(config.train.seed)
        self.model = GPT(config.model, recomputes=config.train.activation_checkpointing).to(ranks.device)
        wish = config.train.compile
        self._compiles = wish or (wish is None and ranks.device.type == "cuda")
        if self._compiles and fused_loss.suits(ranks.device, self.precision.dtype):
            tokens = config.train.rows * config.model.block_size
            self.model.fuse(blocks=config.train.cuda_graphs or fused_blocks.pay(tokens, config.model))
        self._optimizer = new_optimizer(self.model, config.optimizer)
        self._share = Share(self.model, ranks) if config.train.shard_optimizer else None
        self._wrapped: nn.Module = self.model
        self.grad_accum_steps = grad_accum_steps(config, world_size=ranks.world_size)
        self._broken = torch.zeros((), dtype=torch.bool, device=ranks.device)

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint: weights and the optimizer's state."""
        groups = self._optimizer.param_groups
        kept = [(p, len(state_kinds(group) - {"step"})) for group in groups for p in group["params"]]
        return sum(parameter.nbytes * (1 + tensors) for parameter, tensors in kept)

    @property
    def _own(self) -> frozenset[str] | None:
        """The parameters whose state is here; None for all of them."""
        return None if self._share is None else self._share.names

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Take these instead of random ones; ConfigError where they do not fit."""
        state.load_model(self.model, weights.items())

    def load(self, found: Checkpoint, scaler: Mapping[str, Any]) -> None:
        """Go on with the weights and the optimizer of a checkpoint, and with the scaler that its manifest tells of."""
        state.load_model(self.model, self._beating(found.tensors("model/")))
        tensors = self._beating(found.tensors("optimizer/"))
        state.load_optimizer(self._optimizer, self.model, tensors, only=self._own)
        state.load_scaler(self._scaler, scaler)

    def _beating(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each of them is progress: a slow disk takes long for all of them."""
        for each in tensors:
            self._beat()
            yield each

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, or this rank's share of it where the optimizer is sharded; views, not copies."""
        return state.state_tensors(self.model, self._optimizer, only=self._own)

    def scaler_facts(self) -> dict[str, Any]:
        """What its manifest tells of the scaler."""
        return state.scaler_facts(self._scaler)

    def wrap(self) -> None:
        """Compile the model and let DDP reduce its gradients, once it has the weights to begin with: rank 0's become everyone's."""
        if self._compiles:
            mode = "reduce-overhead" if self._config.train.cuda_graphs else None  # torch's name for CUDA graphs
            self.model.compile(mode=mode)  # in place, so no prefix ever enters a name
        if self._ranks.world_size > 1:
            index = self._ranks.device.index
            self._wrapped = parallel = DistributedDataParallel(
                self.model,
                device_ids=None if index is None else [index],
                gradient_as_bucket_view=True,
            )
            if self._config.train.reduce_dtype == "bf16":
                parallel.register_comm_hook(None, mean_in_bf16)

    def warm_up(self) -> None:
        """One discarded forward and backward, before every first step, resumed or not.

        DDP rebuilds its buckets after its first backward and from then on sums gradients in another order. Without
        this a resumed process would take its first step with the first buckets, and differ in the last bits from 3
        ranks on. It also pays for compilation before the clock runs.
        """
        if self._config.train.cuda_graphs:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self._backward(*self._blank(self._config.train.rows))
        self._reset_gradients()

    def _reset_gradients(self) -> None:
        """Free them. With CUDA graphs they stay, as zeros: the next replay overwrites what the last one has returned, so autograd must
        add it to tensors that are not the graphs'."""
        self._optimizer.zero_grad(set_to_none=not self._config.train.cuda_graphs)

    def rehearse(self, rows: int) -> None:
        """Take all the memory of a step of two micro batches of `rows` sequences, without a word to the peers; the weights are no
        longer of use after it."""
        self._optimizer.zero_grad(set_to_none=True)  # of one that failed
        tokens, targets = self._blank(rows)
        for _ in range(2):
            self._backward(tokens, targets)
        self._clip()
        self._update(alone=True)

    def _blank(self, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets: two tensors, since of one for both the compiler would make a case of its own, and compile again later."""
        shape = rows, self._config.model.block_size
        tokens, targets = (torch.zeros(shape, dtype=torch.int64, device=self._ranks.device) for _ in range(2))
        return tokens, targets

    def learn(self, batches: Iterable[tuple[Tensor, Tensor]], step: int) -> tuple[Tensor, Tensor]:
        """The step after `step` steps: accumulate gradients over `grad_accum_steps` batches of inputs and targets, reduce them once,
        clip, update; returns the mean loss and the gradient's norm, on the device."""
        total = torch.zeros((), device=self._ranks.device)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, self._config)
        for micro_step, (tokens, targets) in enumerate(batches, start=1):
            with self._no_sync_before(micro_step):
                total += self._backward(tokens, targets, share=self.grad_accum_steps)
            self._beat()
        norm = self._clip()
        self._update()
        self._broken |= ~torch.isfinite(total)
        if not self._scaler.is_enabled():  # the scaler skips a step whose gradients overflow; that is no divergence
            self._broken |= ~torch.isfinite(norm)
        return total, norm

    def _clip(self) -> Tensor:
        """Bring the gradients down to the norm that they may have; returns the one that they had."""
        self._scaler.unscale_(self._optimizer)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optimizer.grad_clip)

    def _update(self, *, alone: bool = False) -> None:
        """Step with the gradients, or with this rank's share of them, and drop them; `alone`, its peers do not get the weights."""
        if self._share is not None:
            self._share.drop_others()
        self._scaler.step(self._optimizer)
        if self._share is not None and not alone:
            self._share.exchange()
        self._scaler.update()
        self._reset_gradients()

    def _backward(self, tokens: Tensor, targets: Tensor, *, share: int = 1) -> Tensor:
        """Add the gradients of a micro batch, one of `share`, to those that are there; its share of the loss."""
        if self._config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # what was returned before may be overwritten
        with self.precision.autocast():
            loss = self._wrapped(tokens, targets) / share
        self._scaler.scale(loss).backward()
        own: Tensor = loss.detach()
        return own

    def _no_sync_before(self, micro_step: int) -> contextlib.AbstractContextManager[None]:
        """Only the last one, counted from 1, reduces the gradients."""
        if micro_step < self.grad_accum_steps and isinstance(self._wrapped, DistributedDataParallel):
            return cast("contextlib.AbstractContextManager[None]", self._wrapped.no_sync())
        return contextlib.nullcontext()

    def is_broken(self) -> bool:
        """Whether a loss was not finite on any rank, or a gradient's norm; collective, and waits for the device."""
        flag = self._broken.to(torch.int32).cpu()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
