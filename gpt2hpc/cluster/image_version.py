"""Which gpt2hpc is in a container image, by the image's labels: nothing in it has to run, and it takes a second."""

from __future__ import annotations

import json
import shutil
import subprocess

from gpt2hpc import __version__, cli
from gpt2hpc.errors import ConfigError

VERSION_LABEL = "org.opencontainers.image.version"
READERS = {
    "apptainer": ("inspect", "--json", "--labels"),
    "singularity": ("inspect", "--json", "--labels"),
    "docker": ("image", "inspect"),
}
"""Runtimes that tell the labels of an image, and how; pyxis does not, and nothing is known of its images before a job."""
PATIENCE_S = 30.0


def refuse_other_version(image: str, runtime: str) -> None:
    """Raise ConfigError where the image has another gpt2hpc than this one, which writes what the image's will read.

    Where that cannot be told (no such runtime on a login node, an image of pyxis', no label) it is said beside the output,
    and the job looks itself.
    """
    there = version_in(image, runtime)
    if there is None:
        cli.aside(
            f"which gpt2hpc is in {image} is not known here ({_why_unknown(runtime)}): the job looks when it starts"
        )
    elif there != __version__:
        raise ConfigError(mismatch(image, there))


def mismatch(image: str, there: str) -> str:
    """What is wrong, and its mend."""
    return (
        f"the image {image} is of gpt2hpc {there}, and here it is {__version__}, which writes what the image reads: build it again "
        f"(gpt2hpc image build), or install version {there} here"
    )


def version_in(image: str, runtime: str) -> str | None:
    """Of the gpt2hpc in the image; None where nothing tells."""
    return (labels_of(image, runtime) or {}).get(VERSION_LABEL)


def labels_of(image: str, runtime: str) -> dict[str, str] | None:
    """The labels of an image; None where there is no runtime to tell them, or it fails."""
    program = shutil.which(runtime) if runtime in READERS else None
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *READERS[runtime], image],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return labels_in(done.stdout) if done.returncode == 0 else None


def labels_in(said: str) -> dict[str, str] | None:
    """Out of what `apptainer inspect --json --labels` or `docker image inspect` prints; None where that is something else."""
    try:
        facts = json.loads(said)
        labels = facts[0]["Config"]["Labels"] if isinstance(facts, list) else facts["data"]["attributes"]["labels"]
        return {str(name): str(value) for name, value in labels.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _why_unknown(runtime: str) -> str:
    if runtime not in READERS:
        return f"{runtime} does not tell"
    return "it has no such label" if shutil.which(runtime) else f"{runtime} is not on PATH"
