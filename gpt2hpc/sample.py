"""`gpt2hpc sample`: text from a run's newest checkpoint, from a given one, or from weights of others."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2hpc import cli, garbage, jobs
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import tokenizer
from gpt2hpc.errors import ConfigError, DataError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gpt2hpc.model.gpt import GPT

SEEDS = 2**63
"""From 0 to below it."""


@dataclass(frozen=True)
class Text:
    """What was written after a prompt; `finish_reason` is `stop` at the end of a document, `length` at --max-tokens."""

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    seed: int


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="gpt2hpc sample", description="Write text with a trained model.")
    parser.add_argument("path", nargs="?", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument(
        "--init",
        metavar="SOURCE",
        help="other weights instead of RUN: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a transformers directory or a .pt file",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to go on from; may be given more than once (default: the start of a document)",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="more of them, one a line")
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens to write at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="choose among the K likeliest; 0 for all (default: 50)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="of those, among the likeliest that reach this probability together (default: 1, all)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice; each further prompt's is one more (default: 0)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts written on at once (default: 8)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line for each prompt, and nothing else")
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="cpu", help="auto: a GPU if there is one (default: cpu)"
    )
    cli.add_examples(
        parser,
        'gpt2hpc sample runs/mine --prompt "Once upon a time"',
        "gpt2hpc sample --init gpt2 --prompts prompts.txt --json",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    _check(arguments)
    prompts = _prompts(arguments)
    jobs.require_torch()
    with garbage.unsought():
        from gpt2hpc.training import checkpoint, initial

    device = _device(arguments.device)
    if arguments.init is not None:
        name, (config, weights) = arguments.init, initial.named(arguments.init)
    else:
        found = checkpoint.at(arguments.path, cli.warn)
        name, (config, weights) = found.path.name, initial.of_checkpoint(found)
    model = load_model(config, weights).to(device)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write any character, whatever the locale
    began = time.perf_counter()
    if len(prompts) == 1 and not arguments.json:
        cli.say(f"--- {name}")
        count = _stream(model, prompts[0], arguments)
    else:
        count = 0
        for number, text in enumerate(_written(model, prompts, arguments), start=1):
            if arguments.json:
                cli.say(json.dumps({"model": name, **dataclasses.asdict(text)}))
            else:
                cli.say(f"--- {name}: {number} of {len(prompts)}\n{text.prompt}{text.text}")
            count += len(text.tokens)
    seconds = time.perf_counter() - began
    cli.aside(f"{cli.plural(count, 'token')} in {seconds:.1f} s: {count / seconds:.1f} tokens/s on {device}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name, value, least in (
        ("max-tokens", arguments.max_tokens, 1),
        ("temperature", arguments.temperature, 0),
        ("top-k", arguments.top_k, 0),
        ("batch-size", arguments.batch_size, 1),
    ):
        if not value >= least:
            raise UsageError(f"--{name}={value} must be {least} or more")
    if not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top-p={arguments.top_p} must be above 0 and at most 1")
    if not 0 <= arguments.seed < SEEDS:
        raise UsageError(f"--seed={arguments.seed} must be 0 or more, and below 2^63")
    if (arguments.path is None) == (arguments.init is None):
        raise UsageError("give either RUN or --init SOURCE: exactly one model writes")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Those given, then the lines of the file; DataError where it cannot be read as text."""
    found: list[str] = arguments.prompt or []
    if any("\udc80" <= character <= "\udcff" for prompt in found for character in prompt):
        raise UsageError("--prompt holds bytes that are not UTF-8; mend them, or the locale")
    if arguments.prompts is None:
        return found or [""]
    try:
        lines = arguments.prompts.read_text("utf-8-sig").removesuffix("\n").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"--prompts={arguments.prompts} is no file; check the spelling") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts={arguments.prompts} is not UTF-8 ({error}); convert it") from None
    if lines == [""]:
        raise DataError(f"--prompts={arguments.prompts} is empty; write a prompt on each line")
    return [*found, *lines]


def _device(name: str) -> torch.device:
    """As of a training by one process, wherever in a job it is started."""
    from gpt2hpc.training.process_group import select_device

    env = DistEnv.from_env(os.environ)
    return select_device(name, dataclasses.replace(env, rank=0, local_rank=0, world_size=1, local_world_size=1))


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


def _stream(model: GPT, prompt: str, arguments: argparse.Namespace) -> int:
    """Print a text while it is written; the number of its tokens."""
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for found in _tokens(model, [prompt], 0, arguments):
            count += 1
            yield found[0]

    cli.say(prompt, end="")
    for part in tokenizer.decode_stream(counted()):
        cli.say(part, end="")
    cli.say("")
    return count


def _written(model: GPT, prompts: list[str], arguments: argparse.Namespace) -> Iterator[Text]:
    """The texts in the order of the prompts, each batch when it is complete."""
    for first in range(0, len(prompts), arguments.batch_size):
        batch = prompts[first : first + arguments.batch_size]
        written: list[list[int]] = [[] for _ in batch]
        for found in _tokens(model, batch, first, arguments):
            for number, token in found.items():
                written[number].append(token)
        for number, (prompt, tokens) in enumerate(zip(batch, written, strict=True), start=first):
            reason = "length" if len(tokens) == arguments.max_tokens else "stop"
            yield Text(prompt, tokenizer.decode(tokens), tokens, reason, arguments.seed + number)


def _tokens(model: GPT, prompts: list[str], first: int, arguments: argparse.Namespace) -> Iterator[dict[int, int]]:
    """By the place in `prompts`; the first of them is number `first` of all."""
    from gpt2hpc.model.generate import Choice, generate_batch

    return generate_batch(
        model,
        [[tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(prompt)] for prompt in prompts],
        max_tokens=arguments.max_tokens,
        choice=Choice(arguments.temperature, arguments.top_k or None, arguments.top_p),
        seeds=[arguments.seed + first + number for number in range(len(prompts))],
        stop=tokenizer.END_OF_TEXT,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
