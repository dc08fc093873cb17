"""Does a compiled training that goes on from its state come to the same bytes? `python -m bench.exact [--device cuda]`.

A learner takes six steps; another one, new, gets the state of the first after three, and takes the rest: weights and the optimizer's
state are compared, for each way that a training may be told to compute. It is no proof of other shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.train import Shape, settings
from bench.trainers import Batches
from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.config import Config, ModelConfig
from gpt2hpc.training import state
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.process_group import Ranks, make_deterministic

STEPS, STOP = 6, 3
SHAPES = {
    "cpu": Shape(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32), (4, 2), (4, 2)),
    "cuda": Shape(ModelConfig(n_layer=3, n_head=12, n_embd=768, block_size=512), (64, 2), (64, 2)),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """How it is computed."""

    name: str
    deterministic: bool = False
    cuda_graphs: bool = False


WAYS = {
    "cpu": (Way("compiled"),),
    "cuda": (
        Way("compiled, --deterministic", deterministic=True),  # first, as cuBLAS looks at its setting once
        Way("compiled"),
        Way("compiled, CUDA graphs", cuda_graphs=True),
    ),
}


def compare(config: Config, device: torch.device, way: Way) -> dict[str, Any]:
    """How many tensors differ, of how many, and by how much at most."""
    train = dataclasses.replace(config.train, cuda_graphs=way.cuda_graphs, deterministic=way.deterministic)
    config = dataclasses.replace(config, train=train)
    if way.deterministic:
        make_deterministic()
    batches = Batches(config, device)
    undisturbed = _new(config, device)
    _learn(undisturbed, batches, range(STOP))
    kept = {name: tensor.clone() for name, tensor in undisturbed.tensors().items()}
    _learn(undisturbed, batches, range(STOP, STEPS))
    resumed = _new(config, device, kept)
    _learn(resumed, batches, range(STOP, STEPS))
    found, wanted = resumed.tensors(), undisturbed.tensors()
    differ = [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])]
    largest = max((float((wanted[name] - found[name]).abs().max()) for name in differ), default=0.0)
    torch.use_deterministic_algorithms(False)
    return {
        "way": way.name,
        "fused": resumed.model.fuses_blocks,
        "tensors": len(wanted),
        "differ": differ,
        "largest": largest,
    }


def _new(config: Config, device: torch.device, kept: Mapping[str, Tensor] | None = None) -> Learner:
    """With random weights, or with those of a state and its optimizer."""
    torch._dynamo.reset()
    learner = Learner(config, Ranks(DistEnv.from_env({}), device), beat=lambda: None)
    if kept is not None:
        state.load_model(learner.model, ((name, kept[name]) for name in kept if name.startswith("model/")))
        of_optimizer = ((name, kept[name]) for name in kept if name.startswith("optimizer/"))
        state.load_optimizer(learner._optimizer, learner.model, of_optimizer, only=None)
    learner.model.train()
    learner.wrap()
    learner.warm_up()
    return learner


def _learn(learner: Learner, batches: Batches, steps: range) -> None:
    for step in steps:
        learner.learn(batches.of_step(step), step)


def table(facts: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Going on exactly",
            "",
            *report.made(facts),
            f"{facts['shape']}; {STEPS} steps, by one learner, and the last {STEPS - STOP} by another with the state after {STOP}.",
            "",
            "| in " + facts["precision"] + " | fused operators | tensors that differ | by at most |",
            "| --- | --- | ---: | ---: |",
            *(
                f"| {row['way']} | {'yes' if row['fused'] else 'no'} | {len(row['differ'])} of {row['tensors']} | "
                f"{row['largest']:.1e} |"
                for row in facts["rows"]
            ),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exact", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", default="exact", help="of the files in bench/results")
    options = parser.parse_args()
    report.refuse_absent(parser, options.device)
    compile_cache.settle(os.environ, DistEnv.from_env({}))
    shape, precision = SHAPES[options.device], "bf16" if options.device == "cuda" else "fp32"
    config = settings(shape, options.device, way="compiled", precision=precision, steps=STEPS)
    rows = [compare(config, torch.device(options.device), way) for way in WAYS[options.device]]
    of = shape.model
    facts = {
        **report.facts(options.device),
        "shape": f"{of.n_layer} layers of {of.n_embd}, {of.block_size} tokens, "
        f"{config.train.tokens_per_step} tokens a step",
        "precision": precision,
        "rows": rows,
    }
    report.write(options.name, facts, table(facts))


if __name__ == "__main__":
    main()
