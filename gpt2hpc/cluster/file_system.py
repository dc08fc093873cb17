"""What kind of file system a path is on, and whether that is a node's own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "ramfs")


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted, its kind and its options; `root` is the directory of it that is mounted there."""

    where: str
    kind: str
    options: str = ""
    root: str = "/"

    @property
    def is_local(self) -> bool:
        """Whether other nodes do not see it, as a rule."""
        return self.kind in LOCAL


def of(path: Path) -> Mount | None:
    """That of a path, which need not exist; None where Linux does not tell."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return None
    return mount_of(Path(os.path.realpath(path)), mounts)


def mount_of(path: Path, mounts: str) -> Mount | None:
    """From the text of /proc/self/mountinfo (proc(5))."""
    best = None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 6 or not after:
            continue
        root, where = (re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in fields[3:5])
        # Of two at one place the later one hides the earlier.
        if path.is_relative_to(where) and (best is None or len(where) >= len(best.where)):
            best = Mount(where, after.split()[0], fields[5], root)
    return best
