"""Memory that was freed is used again: no page of it is asked for, and zeroed, a second time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
PROGRAM = """
import re, resource, sys, torch
from pathlib import Path
from gpt2hpc.training import heap

def step():
    kept = [torch.ones(size) for size in (5_000_000, 10_000_000, 2_000_000, 20_000_000)]
    kept.append(kept[0] + kept[0])
    del kept[1]
    return torch.ones(8_000_000)

def resident_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

if sys.argv[1] == "kept":
    heap.keep_freed()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = resident_mib()
heap.give_back()
print(held - resident_mib())
"""


def told(way: str) -> tuple[int, int]:
    """Pages that were asked for in ten steps, and MiB that were given back after them."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True)
    pages, given_back = map(int, done.stdout.split())
    return pages, given_back


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    (pages, given_back), (plain_pages, _) = told("kept"), told("plain")
    assert pages < plain_pages / 5
    assert given_back > 100
