"""What a site's ways mean for a job that is to be submitted: files that it deletes, and a Hub that its nodes do not reach."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.config import Config
from gpt2hpc.data import hub


def purged(site: Site, named: Mapping[str, str | Path]) -> list[str]:
    """A line for each path, by the option that names it, that lies where the site deletes old files; links are followed."""
    lines = []
    for option, path in named.items():
        real = Path(os.path.realpath(path))
        inside = [each for each in site.purged if real.is_relative_to(os.path.realpath(each))]
        if not inside:
            continue
        place = max(inside, key=len)
        leads_to = "" if str(real) == os.path.abspath(path) else f" (that is {real})"  # noqa: PTH100
        lines.append(
            f"{option}={path}{leads_to} lies on {place}, where this site deletes files after {site.purged[place]} days: "
            "copy what is to last to another disk in time"
        )
    return lines


def offline(site: Site, config: Config) -> list[str]:
    """What a training asks of the Hub that nodes without internet cannot have."""
    if not site.offline:
        return []
    lines = []
    if config.checkpoint.repo:
        lines.append(
            f"this site's nodes have no internet: checkpoints for {config.checkpoint.repo} wait until you run "
            "`gpt2hpc sync RUN_DIR` on a login node"
        )
    if hub.is_remote(config.data.dir):
        lines.append(
            f"this site's nodes have no internet: data.dir={config.data.dir} will do only where all of it is in the "
            "cache; `gpt2hpc stage` it, and give the directory"
        )
    return lines
