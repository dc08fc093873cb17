"""What is asked of Slurm, each value with its origin: a flag, the site's profile, or a default."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2hpc.cluster import image_version, site_profile
from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.errors import UsageError

PASSED_ON = ("account", "qos", "constraint", "exclude", "mem")
"""Options that go to sbatch as they are, beside the partition."""

_RUNTIMES = typing.get_args(site_profile.Runtime)


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
        named = (
            "flag" if options.get("site") else f"${site_profile.VARIABLE}" if env.get(site_profile.VARIABLE) else None
        )
        self.note("site", self.site.path or "none", named or ("your own" if self.site.path else "default"))
        if options.get("runtime"):
            _check_runtime(options["runtime"])
            self.site = dataclasses.replace(self.site, runtime=options["runtime"])

    def of(self, name: str, default: Any = None) -> Any:
        """The flag's value, else the site's, else the default."""
        for value, origin in (
            (self._options.get(name), "flag"),
            (getattr(self.site, name, None), self.of_site(name)),
            (default, "default"),
        ):
            if value is not None:
                self.note(name, value, origin)
                return value
        return None

    def note(self, name: str, value: Any, origin: str) -> None:
        self.origins[name.replace("_", "-")] = (value, origin)

    def of_site(self, name: str) -> str:
        """The origin of a field of the profile: a flag has it, or it is there, or it is left out."""
        return "flag" if self._options.get(name) else "site" if name in self.site.given else "default"

    def image(self, option: str | None, binds: Sequence[Path]) -> str | None:
        """The container image to run in, if any; how Python is run is noted with it. ConfigError for one of another version."""
        image = self.site.image_to_use(option, binds=binds)
        if image is None:
            self.note(
                "container",
                "none",
                "flag" if option else self.of_site("runtime") if self.site.runtime == "none" else "default",
            )
            python = self.site.python
            self.note("python", python or sys.executable, "site" if python else "default: the one that runs submit")
            return None
        image_version.refuse_other_version(image, self.site.runtime)
        self.note("container", image, "flag" if option else "site")
        self.note("runtime", self.site.runtime, self.of_site("runtime"))
        return image

    def sbatch_options(self) -> dict[str, Any]:
        """The site's own options of sbatch, and those that have a flag."""
        for name, value in self.site.sbatch.items():
            self.note(name, value, "site: sbatch")
        given = {name: self.of(name) for name in ("partition", *PASSED_ON)}
        for name, value in self.site.srun.items():
            self.note(f"srun --{name}", value, "site: srun")
        if self.site.setup:
            self.note("setup", "; ".join(self.site.setup), "site")
        return {**self.site.sbatch, **{name: value for name, value in given.items() if value is not None}}

    def lines(self) -> list[str]:
        """For a dry run: `name = value (origin)` for each."""
        return [f"{name} = {value} ({origin})" for name, (value, origin) in self.origins.items()]


def _check_runtime(given: str) -> None:
    if given not in _RUNTIMES:
        hint = "; podman goes by the name docker" if given == "podman" else ""
        raise UsageError(f"--runtime={given} is none of {', '.join(_RUNTIMES)}{hint}")


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
        "--runtime",
        type=str,
        metavar=f"{{{','.join(_RUNTIMES)}}}",
        help="What runs the image (default: the site's, or apptainer).",
    )
    parser.add_argument(
        "--site",
        type=str,
        metavar="FILE",
        help=f"Site profile, or the name of an example: {', '.join(site_profile.shipped())} "
        f"(default: ${site_profile.VARIABLE}, ~/.config/gpt2hpc/site.yaml).",
    )
