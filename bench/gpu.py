"""Everything that needs a GPU, in less than nine minutes, as one table: `python -m bench.gpu`, or `make bench-gpu`.

Each part is one of the other benchmarks, ends in its time or is named as not done (as the last one where those before took long),
and goes into bench/results/gpu.md and gpu.json. What is not timed runs first, and beside it short turns of what is, all at once as far
as a GPU has room: torch compiles on all cores what it then finds in its cache. `--parts` measures some of them again, and leaves
what the files say of the others; a table stays until there is a newer one, and says itself when and on what it was made.
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
REHEARSALS_S = 100.0


@dataclass(frozen=True)
class Part:
    """A benchmark, its arguments, and the seconds that it may take."""

    name: str
    words: Sequence[str]
    seconds: float
    timed: bool = True
    rehearsed: bool = False

    @property
    def rehearsal(self) -> Sequence[str]:
        """The least of it that compiles the same."""
        words = list(self.words)
        words[words.index("--steps") + 1] = "4"
        return (*words, "--turn", "2")


def parts(device: str) -> list[Part]:
    """What matters most comes first."""
    if device == "cpu":
        tiny = ("train", "--shapes", "tiny")
        return [
            Part("train", (*tiny, "--ways", "eager", "--precisions", "fp32", "--steps", "6"), 300, rehearsed=True),
            Part("overhead", ("overhead", "--shape", "tiny", "--steps", "12"), 300),
            Part("memory", ("memory", "--sizes", "smoke", "--micro-batches", "1"), 300),
            Part("profile", ("profile", "--shape", "tiny", "--steps", "1"), 300),
            Part("exact", ("exact",), 300, timed=False),
        ]
    train = ("train", "--ways", "compiled", "--precisions", "bf16", "--steps")
    plain = ("--shapes", "gpt2-124m", "--contenders", "gpt2hpc", "nanoGPT-style", "--rows")
    memory = torch.cuda.get_device_properties(0).total_memory
    rows = 64 if memory > 120e9 else 32 if memory > 60e9 else 16  # the textbook's step holds a third of it
    recipe = ("--micro-batches", str(512 // rows), "--turn", "2")  # GPT-2's half a million tokens a step
    return [
        Part("exact", ("exact",), 120, timed=False),
        Part("train", (*train, "40", *plain, str(rows)), 110),
        Part("recipe", (*train, "12", *plain, str(rows), *recipe), 110),
        Part("16-rows", (*train, "80", "--turn", "20", "--shapes", "gpt2-124m"), 70, rehearsed=True),
        Part("8-rows", (*train, "80", "--turn", "20", "--shapes", "gpt2-124m", "--rows", "8"), 70, rehearsed=True),
        Part("1558m", (*train, "20", "--contenders", "gpt2hpc", "--shapes", "gpt2-1558m"), 150, rehearsed=True),
        Part("overhead", ("overhead", "--shape", "gpt2-124m", "--steps", "24"), 120),
        Part("little", (*train, "40", "--shapes", "6x384"), 70, rehearsed=True),
        Part("profile", ("profile", "--shape", "gpt2-124m"), 60),
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
        return measure(options.device, Path(folder), chosen, options.seconds, Results.read(name, list(known)))


@dataclass
class Results:
    """What the parts have found, and why others have not; those of before stay until they are measured again."""

    name: str
    everything: Sequence[str]
    found: dict[str, Any]
    missing: dict[str, str]

    @classmethod
    def read(cls, name: str, everything: Sequence[str]) -> Results:
        file = report.RESULTS / f"{name}.json"
        before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"parts": {}, "missing": {}}
        return cls(name, everything, before["parts"], before["missing"])

    def add(self, part: Part, files: Path, fault: str | None) -> None:
        """Write it with all others: what lies in FILES.json and FILES.md, or what was wrong."""
        self.missing.pop(part.name, None)
        if fault:
            self.missing[part.name] = fault + ("; its table is older" if part.name in self.found else "")
        else:
            title, rest = files.with_suffix(".md").read_text().split("\n", 1)
            facts = json.loads(files.with_suffix(".json").read_text())
            self.found[part.name] = {**facts, "table": f"#{title} ({part.name})\n{rest}"}
        ordered = {each: self.found[each] for each in self.everything if each in self.found}
        absent = [f"- Not done: {each} ({why})." for each, why in self.missing.items()]
        texts = [each["table"] for each in ordered.values()]
        report.write(
            self.name,
            {"parts": ordered, "missing": self.missing},
            "\n".join(["# On a GPU", "", *absent, *([""] if absent else []), *texts]),
        )


def measure(device: str, folder: Path, chosen: Sequence[Part], seconds: float, results: Results) -> int:
    """The exit code: 1 where a part that was asked for is missing."""
    began = time.monotonic()

    def gone() -> float:
        return time.monotonic() - began

    def start(words: Sequence[str], files: Path) -> subprocess.Popen[bytes] | None:
        if gone() >= seconds:
            return None
        command = [sys.executable, "-m", f"bench.{words[0]}", *words[1:], "--device", device, "--name", str(files)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        started.callback(lambda: end(process) if process.poll() is None else None)
        return process

    with contextlib.ExitStack() as started:  # ends what goes on when this one is interrupted
        untimed = [(part, start(part.words, folder / part.name)) for part in chosen if not part.timed]
        rehearsals = [(part, start(part.rehearsal, folder / f"{part.name}-0")) for part in chosen if part.rehearsed]
        for part, process in rehearsals:
            cli.note(f"{part.name}, rehearsed: {failure(process, REHEARSALS_S - gone()) or f'after {gone():.0f} s'}")
        for part, process in untimed:
            fault = failure(process, part.seconds - gone())
            results.add(part, folder / part.name, fault)
            cli.note(f"{part.name}: {fault or f'after {gone():.0f} s'}")
        for part in (each for each in chosen if each.timed):
            at, most = gone(), max(0.0, min(part.seconds, seconds - gone()))
            cli.note(f"{part.name}: {most:.0f} s at most")
            fault = failure(start(part.words, folder / part.name), most)
            results.add(part, folder / part.name, fault)
            cli.note(f"{part.name}: {fault or f'took {gone() - at:.0f} s'}")
    return 1 if any(part.name in results.missing for part in chosen) else 0


def failure(process: subprocess.Popen[bytes] | None, seconds: float) -> str | None:
    """Why it has not ended well in this time; it is ended then."""
    if process is None:
        return "no time was left"
    try:
        code = process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return f"not in {seconds:.0f} s"
    finally:
        end(process)
    return f"exit code {code}" if code else None


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
