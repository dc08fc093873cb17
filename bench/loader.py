"""Tokens per second and memory of the loader, side by side: `python -m bench.loader [--shard-tokens 100_000_000] [--rounds 3]`.

Each contender is a process of its own that makes the same number of micro batches as int64 tensors, from shards on the local
disk that are in the page cache. The seed-style loader is the one of build-nanogpt: a whole shard at a time, converted as a whole.
Two figures of time, since they differ: the rate over all batches, and the longest wait for one, which every rank suffers at each
new shard. Memory is what the process itself holds at most (anonymous pages; mapped files are the page cache's).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import machine, versions
from gpt2hpc.data import catalog, manifest, shards

RESULTS = Path(__file__).parent / "results"
ROWS, BLOCK, SHARDS = 16, 1024, 3


def ours(directory: Path) -> Iterator[Any]:
    import torch

    from gpt2hpc.data.loader import Slice, TrainLoader
    from gpt2hpc.data.store import Directory

    loader = TrainLoader(
        catalog.load(str(directory)),
        Directory(directory),
        block_size=BLOCK,
        seed=1,
        shuffle_shards=SHARDS,
        part=Slice(0, 1, ROWS, 1),
    )
    for tokens in loader.stream(0):
        batch = torch.from_numpy(tokens.astype(np.int64))
        yield batch[:, :-1], batch[:, 1:]


def seed_style(directory: Path) -> Iterator[Any]:
    import torch

    for path in sorted(directory.glob("train_*.npy")):
        loaded = np.load(path).astype(np.int32)
        tokens = torch.tensor(loaded, dtype=torch.long)
        for start in range(0, len(tokens) - ROWS * BLOCK, ROWS * BLOCK):
            part = tokens[start : start + ROWS * BLOCK + 1]
            yield part[:-1].view(ROWS, BLOCK), part[1:].view(ROWS, BLOCK)


CONTENDERS: dict[str, Callable[[Path], Iterator[Any]]] = {"seed-style loader": seed_style, "gpt2hpc": ours}


def one(name: str, directory: Path, batches: int) -> dict[str, float]:
    """In a process of its own: rate, longest wait and memory."""
    import torch

    before = anonymous_bytes()
    torch.set_num_threads(1)
    count, longest, checksum = 0, 0.0, 0
    began = last = time.perf_counter()
    peak = 0
    for tokens, _ in islice(CONTENDERS[name](directory), batches):
        checksum += int(tokens[0, 0])  # as a step would, touch what came
        now = time.perf_counter()
        longest, last, count = max(longest, now - last), now, count + tokens.numel()
        if count % (ROWS * BLOCK * 50) == 0:
            peak = max(peak, anonymous_bytes())
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": round(count / seconds),
        "longest_wait_ms": round(longest * 1000, 2),
        "memory_mb": round((max(peak, anonymous_bytes()) - before) / 1e6, 1),
    }


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "DIR", "BATCHES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(options.one[0], Path(options.one[1]), int(options.one[2]))))
        return 0
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.shard_tokens)
        batches = (SHARDS - 1) * options.shard_tokens // (ROWS * BLOCK)
        for _ in range(options.rounds):
            for name in CONTENDERS:
                command = [sys.executable, "-m", "bench.loader", "--one", name, folder, str(batches)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results[name].append(json.loads(done.stdout))
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(("numpy", "torch"))},
        "shards": {"count": SHARDS, "tokens": options.shard_tokens},
        "batch": [ROWS, BLOCK],
        "results": results,
    }
    table = markdown(report)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loader.md").write_text(table)
    (RESULTS / "loader.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


def write_shards(directory: Path, tokens: int) -> None:
    source = np.random.default_rng(0)
    written = [
        shards.write_shard(
            directory,
            split="val" if unit == 0 else "train",
            unit=unit,
            documents=[source.integers(0, 50257, size=BLOCK * 4 if unit == 0 else tokens, dtype=np.uint16)],
        )
        for unit in range(SHARDS + 1)
    ]
    manifest.publish(directory, written, vocab_size=50257, plan={})


def markdown(report: dict[str, Any]) -> str:
    results, shard = report["results"], report["shards"]
    seed = results["seed-style loader"]

    def row(name: str, rounds: list[dict[str, float]]) -> str:
        def middle(key: str) -> float:
            return statistics.median(each[key] for each in rounds)

        rates = [each["tokens_per_second"] / 1e6 for each in rounds]
        ratio = statistics.median(
            ours["tokens_per_second"] / other["tokens_per_second"] for ours, other in zip(rounds, seed, strict=True)
        )
        return (
            f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f}–{max(rates):.0f} | {ratio:.2f} "
            f"| {middle('longest_wait_ms'):.1f} | {middle('memory_mb'):.0f} |"
        )

    return "\n".join(
        [
            f"{report['date']}; {report['machine']['cpu']} ({report['machine']['cores']} cores); "
            + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
            "",
            f"{shard['count']} shards of {shard['tokens']:,} tokens, micro batches of {ROWS} × {BLOCK}; {len(seed)} rounds",
            "",
            "| one process | median Mtok/s | min–max | × seed, median of rounds | longest wait for a batch, ms | own memory, MB |",
            "|---|--:|--:|--:|--:|--:|",
            *(row(name, rounds) for name, rounds in results.items()),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
