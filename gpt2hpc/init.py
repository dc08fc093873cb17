"""`gpt2hpc init`: a site profile for this cluster, guessed by asking it. Each guess is explained; only the file is changed."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli, durable
from gpt2hpc.cluster import site_facts, site_guess, site_profile
from gpt2hpc.cluster.site_facts import Facts
from gpt2hpc.errors import MissingError, UsageError


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc init",
        description="Write a site profile for `gpt2hpc submit` by asking this cluster what it has: partitions, accounts, GPUs, "
        "containers, networks.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write it (default: ~/.config/gpt2hpc/site.yaml, which submit reads)",
    )
    parser.add_argument("--force", action="store_true", help="write over a profile that is there")
    parser.add_argument("--dry-run", action="store_true", help="print the profile, and write nothing")
    cli.add_examples(
        parser,
        "gpt2hpc init --dry-run                 # on a login node: what would be written",
        "gpt2hpc init --out mine.yaml            # then: gpt2hpc submit --site mine.yaml",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    own = site_profile.own_path(os.environ)
    out = arguments.out.expanduser() if arguments.out else own
    cli.check_out(out, example="site.yaml")
    if out.exists() and not arguments.force and not arguments.dry_run:
        raise UsageError(
            f"{out} is there already; look at it, then --force to write over it, or --out FILE for another"
        )
    facts = site_facts.gather(os.environ)
    if facts is None:
        raise MissingError(_no_slurm())
    found = site_guess.guesses(facts)
    written = site_guess.text(found, _header(facts))
    site_profile.read(written, out)
    if arguments.dry_run:
        cli.say(written.rstrip())
        return 0
    for guess in found:
        cli.say(guess.line)
        cli.say(textwrap.fill(guess.why, 100, initial_indent="    ", subsequent_indent="    "))
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.publish_text(out, written)
    cli.say(f"\nwritten to {out}: these are guesses, so look it over")
    used = Path(os.environ.get(site_profile.VARIABLE) or own)
    option = "" if out.resolve() == used.resolve() else f" --site {out}"
    cli.say(f"see what it makes of a job with `gpt2hpc submit --dry-run{option}`")
    return 0


def _header(facts: Facts) -> str:
    name, version = facts.settings.get("ClusterName", "?"), facts.settings.get("SLURM_VERSION", "?")
    return (
        f"Site profile of gpt2hpc for cluster {name} (Slurm {version}), guessed by `gpt2hpc init` on {os.uname().nodename}.\n"
        "Look it over: a line `# key: value` is an example that does nothing. What each key means: docs/sites.md."
    )


def _no_slurm() -> str:
    why = "Slurm does not answer (sinfo, scontrol show config)" if shutil.which("sinfo") else "sinfo is not on PATH"
    examples = ", ".join(site_profile.shipped())
    return (
        f"{why}, so there is no cluster to ask; run it on a login node, or begin with an example: "
        f"`gpt2hpc submit --site NAME --dry-run` with one of {examples}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
