"""`gpt2hpc init` on the real Slurm, in a terminal, as a person has it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2hpc.cluster import site_profile
from tests.cluster.kit import PAIRS, Kit

NODES = 2 * PAIRS

SAID = [
    "partition: main",
    f"    The default partition, with {8 * NODES} GPUs on {NODES} nodes. The others: high, low, low0, lowc.",
    "# account: proj42",
    "    Slurm keeps no accounts here, or does not tell of yours; if sbatch asks for one, name it.",
    "gpus_per_node: 8",
    "    What its nodes have: gpu:8.",
    "gpu_directive: gpus-per-node",
    "    SelectType=select/cons_tres knows --gpus-per-node.",
    "# cpus_per_task: 1",
    "    A node has 4 CPUs, fewer than its 8 GPUs: ask for fewer.",
    "time: 24:00:00",
    "    main has no limit. A job that names no time gets 30:00. A run goes on by itself after its limit,",
    "    and jobs with a shorter one often begin sooner.",
    "runtime: apptainer",
    "    There is a module for it: singularity/3.8, apptainer/1.3.",
    "setup: [module load apptainer/1.3]",
    "    Which makes it known to a job.",
    "# image: $HOME/gpt2hpc.sif",
    "    An image to run in; without one a job uses the Python that runs `gpt2hpc submit`.",
    "binds: [$SCRATCH]",
    "    Your large disks, to be seen in a container too.",
]
"""Of the network, and after it, what this machine has is told."""
END = [
    "# offline: true",
    "    Whether compute nodes reach the internet cannot be seen from here. If not: this.",
    "# purged: {$SCRATCH: 30}",
    "    Where the site deletes files that are so many days old, its pages say. `submit` then warns of",
    "    runs there.",
    "",
]
MODULE = "module() { printf '%s\\n' gcc/12.2 singularity/3.8 'apptainer/1.3(default)'; }\n"


def on_a_terminal(*words: str, kit: Kit, home: Path) -> tuple[int, list[str]]:
    """Run a command of gpt2hpc in a terminal of its own; its exit code and what is on the screen."""
    programs = [path for path in os.environ["PATH"].split(":") if not Path(path, "apptainer").exists()]
    environment = {
        **kit.cluster.environment,
        "PATH": ":".join(programs),
        "HOME": str(home),
        "SCRATCH": str(home / "scratch"),
        "TERM": "xterm",
    }
    for name in ("XDG_CONFIG_HOME", "WORK", "PROJECT", "GPT2HPC_SITE"):
        environment.pop(name, None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2hpc", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        cwd=home,
        start_new_session=True,
    )
    os.close(theirs)
    screen = b""
    try:
        while part := os.read(ours, 65536):
            screen += part
    except OSError:  # how a terminal says that nobody writes any more
        pass
    os.close(ours)
    return process.wait(timeout=60), screen.decode().replace("\r\n", "\n").splitlines()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of a user to whom the site gives a scratch disk and modules."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / ".bash_profile").write_text(MODULE)
    return tmp_path


def test_a_profile_is_guessed_explained_and_taken_by_submit(kit: Kit, home: Path) -> None:
    code, screen = on_a_terminal("init", kit=kit, home=home)
    assert code == 0, screen
    path = home / ".config" / "gpt2hpc" / "site.yaml"
    assert screen[: len(SAID)] == SAID
    assert screen[-len(END) - 2 :] == [
        *END,
        f"written to {path}: these are guesses, so look it over",
        "see what it makes of a job with `gpt2hpc submit --dry-run`",
    ]
    told_of_the_network = "\n".join(screen[len(SAID) : -len(END) - 2])
    assert re.match(r"(# )?environment: \{NCCL_SOCKET_IFNAME: \w+\}\n    \w", told_of_the_network)

    site = site_profile.load(path)
    assert (site.partition, site.gpus_per_node, site.runtime) == ("main", 8, "apptainer")
    assert site.setup == ("module load apptainer/1.3",)
    text = path.read_text()
    assert text.startswith("# Site profile of gpt2hpc for cluster kit (Slurm ")
    every = " ".join(text.replace("\n# ", " ").split())
    for line in SAID + END:
        assert line.strip().removeprefix("# ") in every, "the file explains what the terminal did"

    code, screen = on_a_terminal("submit", "--dry-run", kit=kit, home=home)
    assert code == 0, screen
    assert {"# partition = main (site)", "# gpus-per-node = 8 (site)", "#SBATCH --partition=main"} <= set(screen)


def test_a_second_time_it_asks_for_force(kit: Kit, home: Path) -> None:
    path = home / "mine.yaml"
    path.write_text("partition: mine\n")
    code, screen = on_a_terminal("init", "--out", str(path), kit=kit, home=home)
    assert (code, path.read_text()) == (2, "partition: mine\n")
    assert screen == [
        f"gpt2hpc: error: {path} is there already; look at it, then --force to write over it, or --out FILE for another"
    ]
    code, screen = on_a_terminal("init", "--out", str(path), "--force", kit=kit, home=home)
    assert (code, site_profile.load(path).partition) == (0, "main")
    assert screen[-1] == f"see what it makes of a job with `gpt2hpc submit --dry-run --site {path}`"


def test_a_dry_run_prints_the_file_and_writes_nothing(kit: Kit, home: Path) -> None:
    code, screen = on_a_terminal("init", "--dry-run", kit=kit, home=home)
    assert code == 0, screen
    assert site_profile.read("\n".join(screen), home / "none").partition == "main"
    assert not (home / ".config").exists()
