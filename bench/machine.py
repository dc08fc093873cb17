"""What a table must say of the machine that made it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    installed = {each.metadata["Name"] for each in metadata.distributions()}
    return {name: metadata.version(name) for name in packages if name in installed}
