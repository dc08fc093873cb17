"""Which loss after the same tokens, and how many tokens to the same loss: `python -m bench.optimizers [--steps 320] [--seeds 3]`.

Every run is a real one of the product, on the CPU with one thread a rank: a small GPT-2 over bytes of prose from this machine
(bench/text.py), the same data in the same order for all contenders of a seed. Each contender tries every rate with the first seed,
and takes its best one to the other seeds. What is finished is skipped, what was interrupted goes on: the runs stay in --work.
What is compared:

    AdamW, cosine; AdamW, wsd; Muon, cosine; Muon, wsd
    Muon, cosine, QKV in one piece      queries, keys and values made orthogonal as one matrix, at the rate of Muon, cosine
    AdamW, cosine, two ranks            at the rate of AdamW, cosine, and the same with the gradients reduced in bf16
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
TOKENS_PER_STEP, EVALUATIONS, EVAL_TOKENS = 1024, 12, 16_384
MEGABYTES, VALIDATION_SHARE = 4.0, 0.05
BASE, MUON = "AdamW, cosine", "Muon, cosine"


@dataclass(frozen=True)
class Contender:
    """`sweeps` of its own, or the rate of another one, `like`."""

    name: str
    optimizer: str = "adamw"
    schedule: str = "cosine"
    like: str | None = None
    ranks: int = 1
    reduce_dtype: str = "fp32"
    one_piece: bool = False


CONTENDERS = (
    Contender(BASE),
    Contender(MUON, "muon"),
    Contender("AdamW, wsd", schedule="wsd"),
    Contender("Muon, wsd", "muon", "wsd"),
    Contender("Muon, cosine, QKV in one piece", "muon", like=MUON, one_piece=True),
    Contender("AdamW, cosine, two ranks", like=BASE, ranks=2),
    Contender("AdamW, cosine, two ranks, bf16 reduction", like=BASE, ranks=2, reduce_dtype="bf16"),
)
Curve = list[tuple[int, float]]
"""Tokens and the validation loss after them."""


def settings(contender: Contender, *, rate: float, seed: int, steps: int, data: Path) -> Any:
    """A Config; 1.0M parameters."""
    from gpt2hpc.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

    model = ModelConfig(n_layer=5, n_head=4, n_embd=128, block_size=128, vocab_size=256, padded_vocab_size=256)
    return Config(
        model=model,
        optimizer=OptimizerConfig(
            name=contender.optimizer,  # type: ignore[arg-type]
            schedule=contender.schedule,  # type: ignore[arg-type]
            learning_rate=rate,
            warmup_tokens=steps // 10 * TOKENS_PER_STEP,
        ),
        train=TrainConfig(
            total_steps=steps,
            tokens_per_step=TOKENS_PER_STEP,
            micro_batch_size=TOKENS_PER_STEP // model.block_size // contender.ranks,
            seed=seed,
            device="cpu",
            precision="fp32",
            log_every=10,
            eval_every=max(1, steps // EVALUATIONS),
            eval_tokens=EVAL_TOKENS,
            **({"reduce_dtype": contender.reduce_dtype} if contender.reduce_dtype != "fp32" else {}),
        ),
        data=DataConfig(dir=str(data)),
        checkpoint=CheckpointConfig(every_steps=max(1, steps // 4), keep_last=2),
    )


def prepared(work: Path) -> tuple[Path, str]:
    """Bytes of prose as tokens; where they are, and the manifest's sha256."""
    import numpy as np

    from bench import text
    from gpt2hpc.data import catalog, manifest, shards

    directory = work / "data"
    if not (directory / "manifest.json").exists():
        documents = text.collect(MEGABYTES).documents
        random.Random(1).shuffle(documents)
        tokens = [np.frombuffer(document.encode(), dtype=np.uint8).astype(np.uint16) for document in documents]
        directory.mkdir(parents=True, exist_ok=True)
        held_out = max(1, int(VALIDATION_SHARE * len(tokens)))
        parts = ("val", tokens[:held_out]), ("train", tokens[held_out:])
        written = [
            shards.write_shard(directory, split=split, unit=unit, documents=part)  # type: ignore[arg-type]
            for unit, (split, part) in enumerate(parts)
        ]
        manifest.publish(directory, written, vocab_size=256, plan={"seed": 1})
    found = catalog.load(str(directory))
    return directory, found.sha256


def curve(contender: Contender, *, rate: float, seed: int, steps: int, work: Path) -> Curve:
    """Of a run, which is made unless it is there."""
    from gpt2hpc import config_io, starting
    from gpt2hpc.cluster.launch import LocalJob, SignalRelay, run_attempt
    from gpt2hpc.run_dir import RunDir

    words = contender.name.lower().replace(",", "").replace(" ", "-")
    run = RunDir(work / "runs" / f"{words}-{rate:g}-seed{seed}-{steps}")
    if not run.finished.exists():
        run.create()
        config = settings(contender, rate=rate, seed=seed, steps=steps, data=work / "data")
        config_io.store(starting.check_start(run, config, world_size=contender.ranks)[0], run.config)
        command = [sys.executable, "-m", "bench.optimizers", "--rank", str(run.path)]
        job = LocalJob((*command, *(["--one-piece"] if contender.one_piece else [])), run, contender.ranks, "bench")
        restart = len(list(run.attempts.glob("*.json"))) if run.attempts.is_dir() else 0
        with SignalRelay().installed() as relay, quiet(work / "log"):
            code = run_attempt(job, restart=restart, relay=relay)
        if code or not run.finished.exists():  # a signal lets it save and end, too
            sys.exit(
                f"{run.path} is not finished ({code}); {work / 'log'} says why, and the same command goes on with it"
            )
    rows = [line.split() for line in run.log.read_text().splitlines()]
    return [(int(step) * TOKENS_PER_STEP, float(value)) for step, kind, value in rows if kind == "val"]


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """What the runs say goes there."""
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, kept in enumerate(saved, start=1):
            os.dup2(kept, number)
            os.close(kept)


def rank(run_dir: str, *, one_piece: bool) -> int:
    """A rank of a run, in a process of its own."""
    from gpt2hpc import cli, jobs
    from gpt2hpc.training import optimizer

    if one_piece:
        optimizer.QKV = "nothing"
    return cli.run(lambda argv: jobs.Train(argv[0])(), [run_dir])


def reached(found: Curve, target: float) -> float | None:
    """Tokens after which the validation loss is `target`, between two of them on a line; None where it never is."""
    for (before, above), (after, below) in itertools.pairwise(found):
        if below <= target:
            return before + (after - before) * (above - target) / (above - below) if above > target else before
    return None


def measure(steps: int, seeds: int, work: Path) -> dict[str, Any]:
    """Each contender's sweep and curves, in the order in which others need them."""
    swept: dict[str, dict[float, float]] = {}
    curves: dict[str, list[Curve]] = {each.name: [] for each in CONTENDERS}
    chosen: dict[str, float] = {}
    for each in CONTENDERS:
        if each.like is None:
            tried = {rate: curve(each, rate=rate, seed=1, steps=steps, work=work)[-1][1] for rate in RATES}
            swept[each.name], chosen[each.name] = tried, min(tried, key=lambda rate: tried[rate])
            print(f"{each.name}: {', '.join(f'{rate:g} {loss:.3f}' for rate, loss in tried.items())}", flush=True)
    for seed in range(1, seeds + 1):
        for each in CONTENDERS:
            rate = chosen[each.like or each.name]
            curves[each.name].append(curve(each, rate=rate, seed=seed, steps=steps, work=work))
            print(f"{each.name}, seed {seed}: {curves[each.name][-1][-1][1]:.4f}", flush=True)
    target = statistics.mean(found[-1][1] for found in curves[BASE])
    return {
        "target": target,
        "contenders": {
            each.name: {
                "rate": chosen[each.like or each.name],
                "sweep": swept.get(each.name),
                "losses": [found[-1][1] for found in curves[each.name]],
                "tokens": [reached(found, target) for found in curves[each.name]],
                "curves": curves[each.name],
            }
            for each in CONTENDERS
        },
    }


def row(name: str, each: dict[str, Any], facts: dict[str, Any]) -> str:
    base, losses = facts["contenders"][BASE]["losses"], each["losses"]
    differences = [loss - other for loss, other in zip(losses, base, strict=True)]
    rate, sweep = each["rate"], each["sweep"]
    edge = sweep is not None and rate in (min(sweep), max(sweep))
    taken = f"{rate:g}{' (the edge of what was tried)' if edge else ''}"
    seeds = ", ".join(f"{loss:.3f}" for loss in losses)
    return (
        f"| {name} | {taken} | {statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f} ({seeds}) | "
        f"{statistics.mean(differences):+.4f} ({min(differences):+.4f} to {max(differences):+.4f}) | {tokens(each, facts)} |"
    )


def tokens(each: dict[str, Any], facts: dict[str, Any]) -> str:
    found = [count for count in each["tokens"] if count is not None]
    if len(found) < len(each["tokens"]):
        return f"reached by {len(found)} of {len(each['tokens'])}"
    mean = statistics.mean(found)
    return f"{mean / 1e3:,.0f}k ({mean / (facts['steps'] * TOKENS_PER_STEP):.0%})"


def table(facts: dict[str, Any]) -> str:
    total = facts["steps"] * TOKENS_PER_STEP
    swept = [
        f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in each["sweep"].values()) + " |"
        for name, each in facts["contenders"].items()
        if each["sweep"]
    ]
    return "\n".join(
        [
            "# Optimizers, schedules and bf16 reduction",
            "",
            f"A GPT-2 of {facts['parameters'] / 1e6:.1f}M parameters over bytes of prose, {facts['steps']} steps of "
            f"{TOKENS_PER_STEP:,} tokens ({total / 1e3:,.0f}k), fp32, warm-up of a tenth, down to a tenth of the peak; "
            f"{facts['seeds']} seeds (weights and order of data), validation over {EVAL_TOKENS:,} bytes that are not trained on.",
            f"Made on {facts['made']} by `{facts['command']}` on {facts['machine']['cores']} cores of {facts['machine']['cpu']}, with "
            f"{', '.join(f'{k} {v}' for k, v in facts['versions'].items())}; text from that machine, data {facts['data'][:12]}.",
            "",
            "| | learning rate | validation loss at the end: mean ± deviation (each seed) | "
            f"beside {BASE}, seed by seed: mean (range) | tokens to {facts['target']:.3f} |",
            "| --- | --- | --- | --- | ---: |",
            *(row(name, each, facts) for name, each in facts["contenders"].items()),
            "",
            f"The last column is when the validation loss first is what {BASE} ends with on average, on the way of the same run: the "
            "rate is high still then, so a shorter run may need fewer. Those with two ranks, and QKV in one piece, take the rate of "
            "the plain one.",
            "",
            "Validation loss at the end with each rate, first seed; the best one is taken:",
            "",
            f"| | {' | '.join(f'{rate:g}' for rate in RATES)} |",
            f"| --- |{' ---: |' * len(RATES)}",
            *swept,
            "",
            "A small model and few tokens: differences at 124M and billions of tokens are others.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-optimizers"), help="where the runs stay")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--one-piece", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank:
        return rank(arguments.rank, one_piece=arguments.one_piece)
    for name, value, least in (("--steps", arguments.steps, 1), ("--seeds", arguments.seeds, 2)):
        if value < least:
            parser.error(f"{name}={value} must be {least} or more")
    os.environ["OMP_NUM_THREADS"] = "1"
    work = arguments.work.resolve()
    _, data = prepared(work)
    some = settings(CONTENDERS[0], rate=RATES[0], seed=1, steps=arguments.steps, data=work)
    facts = {
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "parameters": some.model.parameters,
        "data": data,
        "made": datetime.date.today().isoformat(),
        "command": f"python -m bench.optimizers --steps {arguments.steps} --seeds {arguments.seeds}",
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(["torch"])},
        **measure(arguments.steps, arguments.seeds, work),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optimizers.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "optimizers.md").write_text(table(facts))
    print(table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
