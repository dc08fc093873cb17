"""Everything that needs a GPU, in less than nine minutes, as one table: `python -m bench.gpu`, or `make bench-gpu`.

Each part is one of the other benchmarks, ends in its time or is named as not done, and goes into bench/results/gpu.md and gpu.json.
`--device cpu` rehearses it without a GPU, with a model of no size: it shows that all works, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import report
from gpt2hpc import cli

BUDGET_S = 9 * 60.0


@dataclass(frozen=True)
class Part:
    """A benchmark, its arguments, and the seconds that it may take."""

    name: str
    words: Sequence[str]
    seconds: float


def parts(device: str) -> list[Part]:
    if device == "cpu":
        return [
            Part("train", ("train", "--shapes", "tiny", "--ways", "eager", "--steps", "6"), 300),
            Part("overhead", ("overhead", "--shape", "tiny", "--steps", "12"), 300),
            Part("memory", ("memory", "--sizes", "smoke", "--micro-batches", "1"), 300),
        ]
    large = (
        "train",
        "--ways",
        "compiled",
        "--precisions",
        "bf16",
        "--steps",
        "10",
        "--contenders",
        "gpt2hpc",
        "--shapes",
    )
    return [
        Part("train", ("train", "--shapes", "gpt2-124m", "--precisions", "bf16", "--steps", "40"), 200),
        Part("sizes", (*large, "gpt2-350m", "gpt2-774m", "gpt2-1558m"), 200),
        Part("overhead", ("overhead", "--shape", "gpt2-124m", "--steps", "100"), 90),
        Part("memory", ("memory", "--sizes", "gpt2-1558m", "--micro-batches", "2"), 60),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--name", help="of the files in bench/results (default: gpu; nothing is kept of a rehearsal)")
    options = parser.parse_args()
    report.refuse_absent(parser, options.device)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        facts, texts = measured(options.device, Path(folder))
        text = "\n".join(["# On a GPU", "", *report.made(facts), *facts["missing"], *texts])
        report.write(options.name or ("gpu" if options.device == "cuda" else f"{folder}/gpu"), facts, text)
    return 1 if facts["missing"] else 0


def measured(device: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What all parts have found, and the table of each."""
    began, texts, found, missing = time.monotonic(), [], {}, []
    for part in parts(device):
        left = BUDGET_S - (time.monotonic() - began)
        own = folder / part.name
        words = ["-m", f"bench.{part.words[0]}", *part.words[1:], "--device", device, "--name", str(own)]
        cli.note(f"{part.name}: {min(part.seconds, left):.0f} s at most")
        try:
            subprocess.run(
                [sys.executable, *words],
                timeout=max(1.0, min(part.seconds, left)),
                check=True,
                stdout=subprocess.DEVNULL,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            missing.append(f"Not done: {part.name} ({error}).")
            continue
        texts.append(own.with_suffix(".md").read_text().replace("# ", "## ", 1))
        found[part.name] = json.loads(own.with_suffix(".json").read_text())
    return {**report.facts(device), "parts": found, "missing": missing}, texts


if __name__ == "__main__":
    sys.exit(main())
