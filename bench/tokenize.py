"""Tokens per second of one core, side by side in one run: `python -m bench.tokenize [--megabytes 20] [--rounds 7]`.

Every contender runs once in each round, pinned to the same core, and makes the same tokens of the same documents. What a
program sets up once for many units is not timed; what it sets up for each unit is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import operator
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import contenders, text
from bench.machine import machine, versions
from gpt2hpc.data import tokenizer

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "pyarrow", "tiktoken", "gigatoken", "datatrove", "tokenizers")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tokenize", description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text instead of the machine's own")
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # one core has no use for threads; and after the first round datatrove's would wait for each other
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    with warnings.catch_warnings(action="ignore"):  # of the docstrings' files
        found = text.read(options.text) if options.text else text.collect(options.megabytes)
    rates, tokens = measure(found.documents, options.rounds)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "text": {"bytes": found.bytes_by_kind, "documents": len(found.documents), "tokens": tokens},
        "rounds": options.rounds,
        "tokens_per_second": rates,
    }
    table = markdown(report)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tokenize.md").write_text(table)
    (RESULTS / "tokenize.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(documents: Sequence[str], rounds: int) -> tuple[dict[str, list[int]], int]:
    """Tokens per second of each contender in each round, and how many tokens they all made."""
    tokenizer.gpt2()
    running = contenders.contenders()
    rates: dict[str, list[int]] = {name: [] for name in running}
    made: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as warm:
        directory = Path(folder)
        contenders.write_parquet(directory, documents)
        contenders.write_parquet(Path(warm), documents[:100])
        for run in running.values():  # imports, files made once
            run(Path(warm), documents[:100])
        for _ in range(rounds):
            for name, run in running.items():
                began = time.perf_counter()
                made[name] = run(directory, documents)
                rates[name].append(round(made[name] / (time.perf_counter() - began)))
    assert len(set(made.values())) == 1, f"not the same tokens: {made}"
    return rates, next(iter(made.values()))


def markdown(report: dict[str, Any]) -> str:
    rates = report["tokens_per_second"]
    seed, raw = list(rates.values())[:2]
    rows = [
        f"| {name} | {statistics.median(each) / 1e6:.2f} | {min(each) / 1e6:.2f}–{max(each) / 1e6:.2f} "
        f"| {statistics.median(map(operator.truediv, each, seed)):.2f} | {statistics.median(map(operator.truediv, each, raw)):.2f} |"
        for name, each in rates.items()
    ]
    kinds = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in report["text"]["bytes"].items())
    return "\n".join(
        [
            f"{report['date']}; one core of {report['machine']['cpu']} ({report['machine']['cores']} cores); "
            + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
            "",
            f"{report['text']['documents']:,} documents, {report['text']['tokens']:,} tokens ({kinds}); "
            f"{report['rounds']} rounds",
            "",
            "| one core | median Mtok/s | min–max | × seed, median of rounds | × raw tiktoken, median of rounds |",
            "|---|--:|--:|--:|--:|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
