"""The shell around ranks and tasks: what a batch script does before srun and after it.

Blocks of the files in `shell/` are in every script that gpt2hpc submits and, word for word, in each template of `slurm/`;
`python -m gpt2hpc.cluster.script slurm/*.sbatch` puts them there after a change here. On the host they need bash, the usual
small programs (sed, grep, awk, getent, date) and Slurm's own, but no Python: that may live in a container image.

They read these variables: RUN_DIR, DATA (to train), OUT, SOURCE (to prepare), MODEL, HELLASWAG, DATA, OUT (to evaluate);
IMAGE, RUNTIME, BINDS, CONTAINER_ENV, PYTHON (how Python is run); GUARD;
MASTER_ADDR_SUFFIX; PICKLES (submitit's).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gpt2hpc import cli, durable
from gpt2hpc.errors import ConfigError, UsageError

SRUN_ARGS = ("--kill-on-bad-exit=1", "--wait=300", "--export=ALL", "--open-mode=append")
"""Without the first, survivors of a dead rank run on; without --export, `sbatch --export=NONE` hides MASTER_ADDR from the ranks;
without the last, a restart truncates the log. --wait ends ranks that hang after another has ended."""

BLOCKS = {
    "set-up": ("job", "run", "unpack", "python", "requeue", "again", "ranks"),
    "tear-down": ("tear_down",),
    "prepare set-up": ("job", "out", "unpack", "python"),
    "prepare tear-down": ("prepare_tear_down",),
    "evaluate set-up": ("job", "models", "unpack", "python", "ranks"),
    "evaluate tear-down": ("evaluate_tear_down",),
}
"""The files of `shell/` that a block is made of."""
KINDS = ("prepare ", "evaluate ", "")
"""Of templates: for preparing data, for evaluation, for training; each has a set-up and a tear-down of its own."""


def text_of(block: str) -> str:
    """A block as shell, without its marks."""
    if block == "srun":
        return f"srun_args=({' '.join(SRUN_ARGS)})"
    folder = resources.files("gpt2hpc") / "cluster" / "shell"
    return "\n\n".join((folder / f"{name}.sh").read_text(encoding="utf-8").strip("\n") for name in BLOCKS[block])


def lines(block: str) -> list[str]:
    """A block between the marks by which it is found again."""
    return [f"# >>> gpt2hpc {block} >>>", *text_of(block).split("\n"), f"# <<< gpt2hpc {block} <<<"]


def refreshed(text: str, path: Path) -> str:
    """A template with the blocks of today; ConfigError where one is missing."""
    kind = next((kind for kind in KINDS if f"# >>> gpt2hpc {kind}set-up >>>" in text), "")
    for block in (f"{kind}set-up", "srun", f"{kind}tear-down"):
        marked = re.compile(rf"^# >>> gpt2hpc {block} >>>$.*?^# <<< gpt2hpc {block} <<<$", re.DOTALL | re.MULTILINE)
        if len(marked.findall(text)) != 1:
            raise ConfigError(
                f"{path} needs one block between `# >>> gpt2hpc {block} >>>` and `# <<< gpt2hpc {block} <<<`"
            )
        new = "\n".join(lines(block))
        text = marked.sub(lambda match: new, text)  # noqa: B023 -- used at once
    return text


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        raise UsageError("give the templates whose blocks are to be brought up to date, as slurm/*.sbatch")
    for path in map(Path, argv):
        durable.publish_text(path, refreshed(path.read_text(encoding="utf-8"), path))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
