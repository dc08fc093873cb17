"""`gpt2hpc plan`: what a run will take, for an allocation proposal: hours, GPU-hours, jobs, disk, how often to save."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from gpt2hpc import cli, config_io, durable
from gpt2hpc.cluster import site_profile
from gpt2hpc.planning import hardware, inputs, measured, reckoning, text
from gpt2hpc.planning.reckoning import Plan
from gpt2hpc.run_dir import RunDir

NUMBERS = {
    "tokens_per_s_per_gpu": "Tokens/s of one GPU when one node trains this model; instead of the MFU.",
    "mfu": "Share of the peak that a training on one node reaches, such as 0.4.",
    "peak_tflops": "Dense 16-bit peak of a GPU.",
    "link_gbyte_s": "Between the GPUs of a node, each, in one direction.",
    "network_gbit_s": "Of a node's network, in one direction, all its adapters together.",
    "efficiency": "Share of those two rates that an all-reduce reaches.",
    "stall_s": "Seconds that the steps wait for a save.",
    "save_s": "Seconds from the begin of a save until it is on disk.",
    "start_s": "Seconds from a job's start to its first step.",
    "requeue_s": "Seconds from a failure to the next start.",
    "mtbf_hours": "Mean hours between failures of a node, or of the job with --mtbf-of job.",
    "data_tokens": "Tokens of prepared data (default: as many as the run reads).",
}


def new_parser() -> jsonargparse.ArgumentParser:
    parser = config_io.new_parser("plan", "Reckon what a run will take: hours, GPU-hours, jobs, disk.")
    parser.usage = "gpt2hpc plan [--preset NAME] [--gpu KIND] [--nodes N[,N…]] [--from RUN] [--OPTION …] [--SECTION.SETTING VALUE …]"
    cli.add_examples(
        parser,
        "gpt2hpc plan --preset gpt2-350m --gpu a100 --gpus-per-node 4 --nodes 1,2,4,8 --time 24:00:00",
        "gpt2hpc plan --from runs/mine --nodes 16 --mtbf-hours 200",
    )
    parser.add_argument("--gpu", type=str, metavar="KIND", help=f"One of {', '.join(hardware.GPUS)} (default: h100).")
    parser.add_argument(
        "--nodes",
        type=str,
        metavar="N[,N…]",
        help="Nodes (default: 1); of several there is a table, the last is planned.",
    )
    parser.add_argument(
        "--gpus-per-node", type=int, help="GPUs of each node (default: the site's, or the kind's usual node)."
    )
    parser.add_argument(
        "--time", type=str, metavar="LIMIT", help="A job's time limit, as for sbatch (default: the site's)."
    )
    parser.add_argument("--from", type=str, metavar="RUN", help="Take what this run has shown instead of defaults.")
    for name, words in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=words)
    parser.add_argument("--mtbf-of", type=Literal["node", "job"], default="node", help="What --mtbf-hours is of.")
    parser.add_argument(
        "--site",
        type=str,
        metavar="FILE",
        help=f"Site profile (default: ${site_profile.VARIABLE}, ~/.config/gpt2hpc/site.yaml).",
    )
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    return parser


def main(argv: Sequence[str]) -> int:
    parser = new_parser()
    options, config = config_io.parse(parser, _with_settings_of_run(argv))
    seen = measured.observe(Path(options["from"])) if options["from"] else None
    plan = reckoning.reckon(inputs.gather(options.as_dict(), config, os.environ, seen))
    cli.say(durable.to_json(as_json(plan)).rstrip() if options.json else text.render(plan))
    return 0


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the text tells, and the rest."""
    own = ("gpu_hours", "tokens", "mfu", "fits")
    losses = {name: getattr(plan.losses, name)() for name in ("young_s", "daly_s", "best_s")}
    return {**dataclasses.asdict(plan), **{name: getattr(plan, name) for name in own}, "intervals": losses}


def _with_settings_of_run(argv: Sequence[str]) -> list[str]:
    """The settings of --from RUN come first, unless a preset or a file names others."""
    words = [word.partition("=") for word in argv]
    if any(name in ("--preset", "--config") for name, _, _ in words):
        return list(argv)
    for position, (name, equals, value) in enumerate(words):
        path = value if equals else next(iter(argv[position + 1 : position + 2]), "")
        if name == "--from" and RunDir(Path(path)).config.exists():
            return ["--config", str(RunDir(Path(path)).config), *argv]
    return list(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
