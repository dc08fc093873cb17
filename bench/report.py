"""What every table says of the machine that made it, and where it is kept: NAME.md and NAME.json in bench/results."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import machine as processor
from bench.machine import versions

RESULTS = Path(__file__).parent / "results"


def facts(device: str, packages: Sequence[str] = ("torch", "transformers", "numpy")) -> dict[str, Any]:
    """Date, command, machine and versions."""
    given = [word for word in sys.argv[1:] if not word.startswith("--name=")]
    if "--name" in given:  # of the files, which says nothing of what is in them
        at = given.index("--name")
        del given[at : at + 2]
    words = [Path(sys.argv[0]).stem, *given]
    return {
        "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m bench.{shlex.join(words)}",
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **versions(packages)},
    }


def refuse_absent(parser: argparse.ArgumentParser, device: str) -> None:
    """End with a line and exit code 2 where a GPU is asked for and none answers."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU answers to this torch; run it on a machine with one, or with --device cpu")


def machine(device: str) -> dict[str, Any]:
    """The processor; and of a GPU its name and its peak of bf16 FLOP/s, where that is known."""
    found = processor()
    if device == "cuda":
        import torch

        from gpt2hpc.training import precision

        here = torch.device("cuda")
        found |= {"gpu": torch.cuda.get_device_name(here), "peak_flops": precision.peak_flops(here)}
    return found


def made(facts: dict[str, Any]) -> list[str]:
    """A line about it, and an empty one."""
    here = facts["machine"]
    where = f"{here['cores']} cores of {here['cpu']}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    on = f"{here['gpu']}, {where}" if "gpu" in here else where
    return [f"Made on {facts['made']} by `{facts['command']}`, on {on}, with {versions}.", ""]


def write(name: str, facts: dict[str, Any], table: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


def peak_gib(device: str) -> float:
    """The most that this process has held: of the GPU by its tensors, else of the machine's memory."""
    import torch

    from gpt2hpc.training.progress import memory_gib

    return memory_gib(torch.device(device))
