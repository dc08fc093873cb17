"""How much of this machine's memory a process may still take: what the kernel has, and what the cgroups above it leave. Linux only.

The files are those of the kernel's Documentation/admin-guide/cgroup-v2.rst (memory.max), cgroup-v1/memory.rst
(memory.limit_in_bytes), and filesystems/proc.rst (MemAvailable, VmRSS, VmHWM).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_FILES = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""Names of a limit in v2 and in v1, and of what is used of it."""


def available_bytes(root: Path = Path("/")) -> int | None:
    """The least that any of them leaves; None where this is no Linux. `root` is where /proc and /sys are."""
    free = _kib_of(root / "proc/meminfo", "MemAvailable")
    if free is None:
        return None
    return max(0, min([free, *(left for group in _groups(root) if (left := _left_in(group)) is not None)]))


def resident_bytes() -> int:
    """What this process holds now; 0 where this is no Linux."""
    return _kib_of(Path("/proc/self/status"), "VmRSS") or 0


def most_resident_bytes() -> int:
    """The most that this process has held so far; 0 where this is no Linux."""
    return _kib_of(Path("/proc/self/status"), "VmHWM") or 0


def _groups(root: Path) -> Iterator[Path]:
    """The directories of this process's memory cgroup and of those above it; a container may see only the last."""
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [mounted, mounted / "unified"]
        elif "memory" in controllers.split(","):
            tops = [mounted / "memory"]
        else:
            continue
        for top in tops:
            group = top / path.lstrip("/")
            yield from (each for each in (group, *group.parents) if each.is_relative_to(top))


def _left_in(group: Path) -> int | None:
    """Bytes up to its limit, if it has one; the cache of files that nobody has looked at lately gives way."""
    for limit_name, used_name in _FILES.items():
        limit, used = _text(group / limit_name).strip(), _text(group / used_name).strip()
        if limit.isdecimal() and used.isdecimal():
            cache = re.findall(r"^(?:total_)?inactive_file (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
            return int(limit) - int(used) + max(map(int, cache), default=0)
    return None


def _kib_of(path: Path, name: str) -> int | None:
    """`NAME:  123 kB` of a file of /proc, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _text(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
