"""Limits of the shell (ulimit), which jobs inherit from the shell that calls sbatch, and the locale."""

from __future__ import annotations

import locale
import os
import resource
from pathlib import Path

from gpt2hpc.checks.scene import Scene
from gpt2hpc.finding import Finding, missing, ok, warn

ENOUGH_FILES, ENOUGH_PROCESSES = 1024, 2048
UNLIMITED = resource.RLIM_INFINITY
INHERITED = "; Slurm passes it on to jobs"


def look(scene: Scene) -> list[Finding]:
    return [_files(), _processes(), *_memory(), _locked(), *_sizes(scene), *_cores(scene), _encoding()]


def shown(value: int, unit: str = "") -> str:
    return "unlimited" if value == UNLIMITED else f"{value:,}{unit}"


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != UNLIMITED and soft < ENOUGH_FILES:
        return warn(
            "open files", f"{soft} at once is few for shards and connections; `ulimit -n {shown(hard)}`{INHERITED}"
        )
    return ok("open files", shown(soft))


def _processes() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != UNLIMITED and soft < ENOUGH_PROCESSES and os.geteuid() != 0:  # root is not bound by it
        text = f"{soft:,} is few, for threads count too; `ulimit -u {shown(hard)}`{INHERITED}"
        return warn("processes", text)
    return ok("processes", shown(soft))


def _memory() -> list[Finding]:
    """Address space: CUDA reserves far more than it uses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == UNLIMITED:
        return []
    mend = "`ulimit -v unlimited`" if hard == UNLIMITED else "ask for a shell without it, as by sbatch --propagate=NONE"
    return [warn("address space", f"{soft >> 20:,} MiB (ulimit -v) is a limit that CUDA runs into; {mend}{INHERITED}")]


def _locked() -> Finding:
    """Network cards read and write memory that cannot move."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if any(Path("/sys/class/infiniband").glob("*")) and soft != UNLIMITED and soft < 1 << 30:
        text = (
            f"{soft >> 10:,} KiB (ulimit -l) is too little for InfiniBand, and NCCL fails; `ulimit -l unlimited` before sbatch, "
            "sbatch --propagate=NONE, or LimitMEMLOCK=infinity of slurmd"
        )
        return missing("locked memory", text)
    return ok(
        "locked memory", "unlimited" if soft == UNLIMITED else f"{soft >> 10:,} KiB; InfiniBand, if any, wants more"
    )


def _sizes(scene: Scene) -> list[Finding]:
    """Of a single file, and of CPU time: login nodes set them, and Slurm passes them on."""
    found = []
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != UNLIMITED and largest < scene.checkpoint_bytes:
        text = f"{largest / 1e9:,.2f} GB (ulimit -f), a checkpoint has {scene.checkpoint_bytes / 1e9:,.2f} GB; `ulimit -f unlimited`"
        found.append(missing("file size", text + INHERITED))
    cpu_s, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if cpu_s != UNLIMITED:
        text = f"{cpu_s:,} s (ulimit -t) of each process, which is then killed; submit with sbatch --propagate=NONE"
        found.append(warn("CPU time", text))
    return found


def _cores(scene: Scene) -> list[Finding]:
    """On a node that computes."""
    if not scene.is_in_job:
        return []
    cores, said = len(os.sched_getaffinity(0)), scene.env.get("SLURM_GPUS_ON_NODE", "")
    gpus = int(said) if said.isdecimal() else 0
    if gpus and cores < 2 * gpus:
        text = f"{cores} for {gpus} GPUs: loading data and saving will hold up the steps; ask for --cpus-per-task 4 or more"
        return [warn("cores", text)]
    return [ok("cores", f"{cores} of this node's {os.cpu_count()}")]


def _encoding() -> Finding:
    encoding = locale.getpreferredencoding(False)
    if encoding.lower().replace("-", "") != "utf8":
        return warn("locale", f"{encoding}: texts that are printed may break; export LC_ALL=C.UTF-8")
    return ok("locale", encoding)
