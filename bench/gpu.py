"""Everything that needs a GPU, in less than nine minutes, as one table: `python -m bench.gpu`, or `make bench-gpu`.

Each part is one of the other benchmarks, ends in its time or is named as not done (as the last one where those before took long),
and goes into bench/results/gpu.md and gpu.json. `--parts` measures some of them again, and leaves what the files say of the others; a
table stays until there is a newer one, and says itself when and on what it was made.
`--device cpu` rehearses it without a GPU, with a model of no size: it shows that all works, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    """What matters most comes first."""
    if device == "cpu":
        return [
            Part("train", ("train", "--shapes", "tiny", "--ways", "eager", "--steps", "6"), 300),
            Part("overhead", ("overhead", "--shape", "tiny", "--steps", "12"), 300),
            Part("memory", ("memory", "--sizes", "smoke", "--micro-batches", "1"), 300),
            Part("exact", ("exact",), 300),
        ]
    train = ("train", "--ways", "compiled", "--precisions", "bf16", "--steps")
    plain = ("--shapes", "gpt2-124m", "--contenders", "gpt2hpc", "nanoGPT-style", "--rows")
    rows = 64 if torch.cuda.get_device_properties(0).total_memory > 120e9 else 16  # a quarter of the memory
    recipe = ("--micro-batches", str(512 // rows), "--turn", "2")  # GPT-2's half a million tokens a step
    return [
        Part("train", (*train, "40", *plain, str(rows)), 110),
        Part("recipe", (*train, "12", *plain, str(rows), *recipe), 110),
        Part("little", (*train, "40", "--shapes", "6x384"), 70),
        Part("1558m", (*train, "20", "--contenders", "gpt2hpc", "--shapes", "gpt2-1558m"), 150),
        Part("overhead", ("overhead", "--shape", "gpt2-124m", "--steps", "24"), 120),
        Part("exact", ("exact",), 120),
        Part("starts", ("startup", "--rounds", "1", "--compiled-only"), 150),
        Part("memory", ("memory", "--sizes", "gpt2-1558m", "--micro-batches", "4", "--ways", *MEMORY), 90),
    ]


MEMORY = ("plain", "activation checkpointing")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--name", help="of the files in bench/results (default: gpu; nothing is kept of a rehearsal)")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help=f"in all (default: {BUDGET_S:.0f})")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these only, in this order (default: all)")
    options = parser.parse_args()
    report.refuse_absent(parser, options.device)
    known = {part.name: part for part in parts(options.device)}
    if unknown := [name for name in options.parts or () if name not in known]:
        parser.error(f"--parts {unknown[0]!r}: the parts are {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        name = options.name or ("gpu" if options.device == "cuda" else f"{folder}/gpu")
        chosen = [known[each] for each in options.parts or known]
        file = report.RESULTS / f"{name}.json"
        if file.exists() and "parts" not in json.loads(file.read_text()):
            parser.error(f"--name {name!r}: {file} is of another benchmark; name it otherwise")
        return measure(options.device, Path(folder), name, chosen, options.seconds, list(known))


def measure(
    device: str, folder: Path, name: str, chosen: Sequence[Part], seconds: float, everything: Sequence[str]
) -> int:
    """What the parts have found, and the table of each, beside those of before; written after each of them. 1 where one is missing."""
    ends, file = time.monotonic() + seconds, report.RESULTS / f"{name}.json"
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"parts": {}, "missing": {}}
    found, missing = before["parts"], before["missing"]
    for part in chosen:
        most = min(part.seconds, ends - time.monotonic())
        own = folder / part.name
        words = ["-m", f"bench.{part.words[0]}", *part.words[1:], "--device", device, "--name", str(own)]
        cli.note(f"{part.name}: {most:.0f} s at most")
        began = time.monotonic()
        missing.pop(part.name, None)
        if fault := failure([sys.executable, *words], most):
            missing[part.name] = fault + ("; its table is older" if part.name in found else "")
            cli.note(f"{part.name}: {fault}")
        else:
            cli.note(f"{part.name}: took {time.monotonic() - began:.0f} s")
            table = own.with_suffix(".md").read_text().replace("# ", "## ", 1)
            found[part.name] = {**json.loads(own.with_suffix(".json").read_text()), "table": table}
        ordered = {each: found[each] for each in everything if each in found}
        absent = [f"- Not done: {each} ({why})." for each, why in missing.items()]
        facts = {"parts": ordered, "missing": missing}
        texts = [each["table"] for each in ordered.values()]
        report.write(name, facts, "\n".join(["# On a GPU", "", *absent, *([""] if absent else []), *texts]))
    return 1 if any(part.name in missing for part in chosen) else 0


def failure(command: Sequence[str], seconds: float) -> str | None:
    """Why it has not ended well in this time; all that it has started is ended with it."""
    if seconds <= 0:
        return "no time was left"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"not in {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit code {code}" if code else None


if __name__ == "__main__":
    sys.exit(main())
