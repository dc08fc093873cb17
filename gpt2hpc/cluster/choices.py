"""What is asked of Slurm, each value with its origin: a flag, the site's profile, or a default."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from gpt2hpc.cluster import site_profile
from gpt2hpc.cluster.site_profile import Site

PASSED_ON = ("account", "qos", "constraint", "exclude", "mem")
"""Options that go to sbatch as they are, beside the partition."""


class Choices:
    """Picks values, and remembers whence.

    Args:
        options: The command line's, by their names; None where not given.
        env: Where a site profile may be named.
    """

    def __init__(self, options: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self._options = options
        self.site: Site = site_profile.find(options.get("site"), env)
        self.origins: dict[str, tuple[Any, str]] = {}
        self.note("site", self.site.path or "none", "--site, $GPT2HPC_SITE or ~/.config/gpt2hpc/site.yaml")

    def of(self, name: str, default: Any = None) -> Any:
        """The flag's value, else the site's, else the default."""
        for value, origin in (
            (self._options.get(name), "flag"),
            (getattr(self.site, name, None), "site"),
            (default, "default"),
        ):
            if value is not None:
                self.note(name, value, origin)
                return value
        return None

    def note(self, name: str, value: Any, origin: str) -> None:
        self.origins[name.replace("_", "-")] = (value, origin)

    def sbatch_options(self) -> dict[str, Any]:
        """The site's own options of sbatch, and those that have a flag."""
        given = {name: self.of(name) for name in ("partition", *PASSED_ON)}
        return {**self.site.sbatch, **{name: value for name, value in given.items() if value is not None}}

    def comments(self) -> str:
        """For a dry run: a line of shell comment each."""
        return "".join(f"# {name} = {value} ({origin})\n" for name, (value, origin) in self.origins.items())


def add_options(parser: argparse._ActionsContainer) -> None:
    """The flags of sbatch that every job has."""
    parser.add_argument("--job-name", type=str, help="Name of the Slurm job.")
    for name in ("partition", *PASSED_ON):
        parser.add_argument(f"--{name}", type=str, help=f"As sbatch --{name}.")
    parser.add_argument(
        "--cpus-per-task", type=int, help="CPU cores for each process or task, as sbatch --cpus-per-task."
    )
    parser.add_argument(
        "--container", type=str, metavar="IMAGE", help="Run inside this image; `none` overrides the site's."
    )
    parser.add_argument(
        "--site",
        type=str,
        metavar="FILE",
        help=f"Site profile (default: ${site_profile.VARIABLE}, ~/.config/gpt2hpc/site.yaml).",
    )
