"""`gpt2hpc doctor`: whether what a training will need is there, before it is needed.

Exit code 0, or 8 if something is missing; each line says what to do about it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from gpt2hpc import cli, durable
from gpt2hpc.errors import MissingError, UsageError
from gpt2hpc.training import hub_access
from gpt2hpc.training.hub_access import Finding

Check = Callable[[], list[Finding]]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpt2hpc doctor", description="Look at what a training will need.")
    parser.add_argument(
        "--hub",
        metavar="USER/NAME",
        help="whether checkpoints may be uploaded to this model repository; creates nothing",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    cli.add_examples(
        parser,
        "gpt2hpc doctor --hub USER/NAME          # may checkpoints go there?",
    )
    arguments = parser.parse_args(argv)
    checks: list[Check] = []
    if arguments.hub:
        checks.append(lambda: hub_access.examine(arguments.hub, create=False))
    if not checks:
        raise UsageError("nothing to look at; name a model repository with --hub USER/NAME")
    found = [finding for check in checks for finding in check()]
    if arguments.json:
        cli.say(durable.to_json([dataclasses.asdict(finding) for finding in found]).rstrip())
    else:
        cli.say("\n".join(finding.line for finding in found))
    return MissingError.exit_code if any(finding.state == "MISSING" for finding in found) else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
