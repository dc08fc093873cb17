"""How fast text is written: `python -m bench.generate [--rounds 3]`.

The model is that of a preset with random weights, in fp32, on the CPU; each token is the likeliest one. The contenders hold the
same weights, take turns in one process of one thread, and must write the same tokens. Seconds are those that the thread had a core:
other work on the machine then counts little. What is compared:

    the whole text anew       our model without a cache: all tokens so far are read for each new one, and the head sees the last
    transformers' generate    as it comes, with its own cache
    ours                      what `gpt2hpc sample` does
"""

from __future__ import annotations

import argparse
import datetime
import json
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import machine, versions
from gpt2hpc import config_io
from gpt2hpc.config import ModelConfig
from gpt2hpc.model import fit, hf_weights
from gpt2hpc.model.generate import Choice, generate_batch
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import state

RESULTS = Path(__file__).parent / "results"
ANEW, TRANSFORMERS, OURS = "the whole text anew", "transformers' generate", "ours"
Prompts = list[list[int]]
Contender = Callable[[Prompts, int], Prompts]
"""Of prompts and a number of tokens, the new tokens of each."""


def transformers_model(config: ModelConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head}
    return GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, n_positions=config.block_size, **sizes)).eval()


def our_model(theirs: Any, config: ModelConfig) -> GPT:
    model = GPT(config).eval()
    weights = fit.fitted(hf_weights.from_state_dict(theirs.state_dict()), config, config, source="theirs")
    state.load_model(model, weights.items())
    return model


def contenders(config: ModelConfig) -> dict[str, Contender]:
    theirs = transformers_model(config)
    model = our_model(theirs, config)

    @torch.no_grad()
    def anew(prompts: Prompts, count: int) -> Prompts:
        tokens = torch.tensor(prompts)
        for _ in range(count):
            logits = model.head(model.hidden(tokens)[:, -1])
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
        return tokens[:, len(prompts[0]) :].tolist()

    def transformers(prompts: Prompts, count: int) -> Prompts:
        tokens = torch.tensor(prompts)
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, len(prompts[0]) :].tolist()

    def ours(prompts: Prompts, count: int) -> Prompts:
        written: Prompts = [[] for _ in prompts]
        seeds = range(len(prompts))
        for found in generate_batch(model, prompts, max_tokens=count, choice=Choice(temperature=0), seeds=seeds):
            for number, token in found.items():
                written[number].append(token)
        return written

    return {ANEW: anew, TRANSFORMERS: transformers, OURS: ours}


def measure(running: dict[str, Contender], prompts: Prompts, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of the one thread, of each in each round."""
    rates: dict[str, list[float]] = {name: [] for name in running}
    for run in running.values():
        run(prompts, 3)
    for _ in range(rounds):
        written = {}
        for name, run in running.items():
            began = time.process_time()
            written[name] = run(prompts, tokens)
            rates[name].append(round(len(prompts) * tokens / (time.process_time() - began), 2))
            print(f"{len(prompts)} × {tokens} tokens, {name}: {rates[name][-1]:.1f} tokens/s", flush=True)
        assert all(each == written[OURS] for each in written.values()), "the contenders write different tokens"
    return rates


def times(rates: dict[str, list[float]], name: str, other: str) -> str:
    """Median of the rounds' ratios."""
    if other not in rates or name not in rates:
        return ""
    return f"{statistics.median(map(operator.truediv, rates[name], rates[other])):.2f}"


def table(facts: dict[str, Any]) -> str:
    rows = [
        f"| {batch} | {name} | {statistics.median(each):.1f} | {min(each):.1f}–{max(each):.1f} "
        f"| {times(rates, name, ANEW)} | {times(rates, name, TRANSFORMERS)} |"
        for batch, rates in facts["tokens_per_second"].items()
        for name, each in rates.items()
    ]
    made = f"Made on {facts['made']} by `{facts['command']}`, with "
    return "\n".join(
        [
            "# Generating",
            "",
            f"{facts['preset']} with random weights, fp32, one thread on {facts['machine']['cpu']} ({facts['machine']['cores']} "
            f"cores); prompts of {facts['prompt_tokens']} tokens, {facts['new_tokens']} new ones each, the likeliest. Reading the "
            f"prompt counts. {facts['rounds']} rounds by turns; all wrote the same tokens.",
            made + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".",
            f"The load of the machine was {facts['load_before']:.1f} before: {facts['shared']}.",
            "",
            "| prompts at once | | tokens/s, median | min–max | × anew, median of rounds | × transformers, median of rounds |",
            "| ---: | --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    config = config_io.load(config_io.presets()[options.preset]).model
    running = contenders(config)
    source = torch.Generator().manual_seed(1)
    size = (options.batch_size, options.prompt_tokens)
    prompts: Prompts = torch.randint(0, config.vocab_size, size, generator=source).tolist()
    cached = {name: run for name, run in running.items() if name != ANEW}  # which would take minutes
    facts = {
        "preset": options.preset,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "load_before": load,
        "shared": "it was shared with other work, and ratios say more than rates" if load > 0.5 else "it was idle",
        "made": datetime.date.today().isoformat(),
        "command": f"python -m bench.generate --rounds {options.rounds}",
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(["torch", "transformers"])},
        "tokens_per_second": {
            1: measure(running, prompts[:1], options.new_tokens, options.rounds),
            options.batch_size: measure(cached, prompts, options.new_tokens, options.rounds),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "generate.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "generate.md").write_text(table(facts))
    print(table(facts))


if __name__ == "__main__":
    main()
