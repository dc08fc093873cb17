"""`gpt2hpc sample`: text from a run's newest checkpoint, from a given one, or from weights of others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2hpc import cli, jobs
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import tokenizer
from gpt2hpc.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2hpc.model.gpt import GPT


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpt2hpc sample", description="Write text with a trained model.")
    parser.add_argument("path", nargs="?", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument(
        "--init",
        metavar="SOURCE",
        help="other weights instead of RUN: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a transformers directory or a .pt file",
    )
    parser.add_argument("--prompt", default="", help="text to go on from (default: the start of a document)")
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens to write at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="choose among the K likeliest; 0 for all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    for name, value, least in (
        ("max-tokens", arguments.max_tokens, 1),
        ("temperature", arguments.temperature, 0),
        ("top-k", arguments.top_k, 0),
    ):
        if not value >= least:
            raise UsageError(f"--{name}={value} must be {least} or more")
    if (arguments.path is None) == (arguments.init is None):
        raise UsageError("give either RUN or --init SOURCE: exactly one model writes")
    jobs.require_torch()
    from gpt2hpc.training import checkpoint, initial

    if arguments.init is not None:
        name, (config, weights) = arguments.init, initial.named(arguments.init)
    else:
        found = checkpoint.at(arguments.path, cli.warn)
        name, (config, weights) = found.path.name, initial.of_checkpoint(found)
    model = load_model(config, weights)
    cli.say(f"--- {name}")
    prompt = [tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(arguments.prompt)]
    cli.say(arguments.prompt + tokenizer.decode(_write(model, prompt, arguments)))
    return 0


def load_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> GPT:
    """The model with those weights, on the CPU; ConfigError where GPT-2's tokens are not its own."""
    from gpt2hpc.model.gpt import GPT
    from gpt2hpc.training import state

    if config.vocab_size != tokenizer.VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size={config.vocab_size} is not GPT-2's {tokenizer.VOCAB_SIZE}, so its tokens are no text here; choose a "
            "model of GPT-2's vocabulary"
        )
    model = GPT(config)
    state.load_model(model, weights.items())
    return model


def _write(model: GPT, prompt: list[int], arguments: argparse.Namespace) -> list[int]:
    from gpt2hpc.model.generate import generate

    tokens = generate(
        model,
        prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k or None,
        seed=arguments.seed,
        stop=tokenizer.END_OF_TEXT,
    )
    return list(tokens)


if __name__ == "__main__":
    sys.exit(cli.run(main))
