"""What a table must say of the machine that made it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor by its name, with the numbers that tell Zen 4 from Zen 5 where a virtual machine names neither."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    about = {name.strip(): value.strip() for name, _, value in lines}
    numbers = [f"{name} {about[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in about]
    cpu = about.get("model name", platform.machine()) + (f" ({', '.join(numbers)})" if numbers else "")
    return {"cpu": cpu, "cores": os.cpu_count()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    installed = {each.metadata["Name"] for each in metadata.distributions()}
    return {name: metadata.version(name) for name in packages if name in installed}
