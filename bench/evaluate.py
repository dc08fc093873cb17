"""HellaSwag's examples a second: `python -m bench.evaluate [--examples 48] [--rounds 3]`.

Random weights and random tokens, with lengths about those of the validation set (contexts of 15 to 100 tokens, endings of 8 to 45).
Both give the same answers, which is checked. They take turns in one process. What is compared:

    one at a time       four rows a model call, the context in each, all logits: the loop of build-nanogpt
    ours                the context once, many examples a call, the head where an ending is predicted
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bench.machine import machine, versions
from gpt2hpc import config_io
from gpt2hpc.evaluation import hellaswag
from gpt2hpc.evaluation.examples import Example
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import precision

RESULTS = Path(__file__).parent / "results"


def made_up(count: int, vocab_size: int) -> list[Example]:
    source = random.Random(0)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(source.randrange(vocab_size) for _ in range(source.randint(least, most)))

    return [Example(tokens(15, 100), tuple(tokens(8, 45) for _ in range(4)), source.randrange(4)) for _ in range(count)]


@torch.no_grad()
def one_at_a_time(model: GPT, examples: list[Example], chosen: precision.Precision) -> int:
    """How many are answered rightly by the loss a token."""
    right = 0
    for example in examples:
        length = max(map(len, example.endings))
        rows = torch.zeros(4, len(example.context) + length, dtype=torch.int64)
        mask = torch.zeros_like(rows)
        for row, (ending, counts) in enumerate(zip(example.endings, mask, strict=True)):
            both = torch.tensor((*example.context, *ending))
            rows[row, : len(both)] = both
            counts[len(example.context) : len(both)] = 1
        rows, mask = rows.to(chosen.device), mask.to(chosen.device)
        with chosen.autocast():
            logits = model(rows)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(
            4, -1
        )
        means = (losses * mask[:, 1:]).sum(dim=1) / mask.sum(dim=1)
        right += int(means.argmin()) == example.label
    return right


def ours(model: GPT, examples: list[Example], chosen: precision.Precision) -> int:
    return hellaswag.score(model, examples, chosen).right_norm


CONTENDERS = {"one at a time": one_at_a_time, "ours": ours}


def table(facts: dict[str, Any]) -> str:
    base = facts["contenders"]["one at a time"]["examples_per_s"]
    rows = [
        f"| {name} | {each['examples_per_s']:,.2f} | {each['examples_per_s'] / base:.2f} × |"
        for name, each in facts["contenders"].items()
    ]
    return "\n".join(
        [
            "# HellaSwag",
            "",
            f"{facts['preset']}, {facts['precision']} on {facts['device']}, {facts['machine']['cores']} cores of "
            f"{facts['machine']['cpu']}; "
            f"{facts['examples']} made-up examples, medians of {facts['rounds']} rounds by turns.",
            f"Made on {facts['made']} by `{facts['command']}`, with {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}.",
            "",
            "| | examples/s | |",
            "| --- | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    config = config_io.load(config_io.presets()[arguments.preset]).model
    device = torch.device(arguments.device)
    chosen = precision.choose("auto", device)
    torch.manual_seed(0)
    model, examples = GPT(config).to(device).eval(), made_up(arguments.examples, config.vocab_size)
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(arguments.rounds + 1):
        answers = set()
        for name, contender in CONTENDERS.items():
            part = examples if number else examples[:4]
            began = time.perf_counter()
            answers.add(contender(model, part, chosen))
            if number:  # the first round warms up
                rates[name].append(len(part) / (time.perf_counter() - began))
        assert len(answers) == 1 or device.type == "cuda", answers
        print({name: [f"{rate:.2f}" for rate in found] for name, found in rates.items()}, flush=True)
    facts = {
        "preset": arguments.preset,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        "precision": str(chosen.dtype).removeprefix("torch."),
        "examples": arguments.examples,
        "rounds": arguments.rounds,
        "made": datetime.date.today().isoformat(),
        "command": f"python -m bench.evaluate --examples {arguments.examples} --rounds {arguments.rounds}",
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(["torch"])},
        "contenders": {
            name: {"examples_per_s": statistics.median(found), "all": found} for name, found in rates.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evaluate.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "evaluate.md").write_text(table(facts))
    print(table(facts))


if __name__ == "__main__":
    main()
