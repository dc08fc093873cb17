"""Which gpt2hpc is in a container image, by the image's labels: nothing in it has to run, and it takes a second."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping

from gpt2hpc import __version__, cli
from gpt2hpc.errors import ConfigError

VERSION_LABEL, TITLE_LABEL, TITLE = "org.opencontainers.image.version", "org.opencontainers.image.title", "gpt2hpc"
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
    labels, reason = asked(image, runtime)
    there = version_among(labels or {})
    if there is None:
        why = reason or f"it has no label {VERSION_LABEL} of gpt2hpc's"
        cli.aside(f"which gpt2hpc is in {image} is not known here ({why}): the job looks when it starts")
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
    return version_among(labels_of(image, runtime) or {})


def version_among(labels: Mapping[str, str]) -> str | None:
    """The label's, where the title says whose it is: an image has the labels of its base too, and Ubuntu's names Ubuntu's version."""
    return labels.get(VERSION_LABEL) if labels.get(TITLE_LABEL) == TITLE else None


def labels_of(image: str, runtime: str) -> dict[str, str] | None:
    """The labels of an image; None where there is no runtime to tell them, or it fails."""
    return asked(image, runtime)[0]


def asked(image: str, runtime: str) -> tuple[dict[str, str] | None, str | None]:
    """The labels of an image, and, where there are none to be had, why."""
    if runtime not in READERS:
        return None, f"{runtime} does not tell"
    program = shutil.which(runtime)
    if program is None:
        return None, f"{runtime} is not on PATH"
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
    except subprocess.TimeoutExpired:
        return None, f"{runtime} does not answer in {PATIENCE_S:g} s"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{runtime} cannot be started: {error}"
    if done.returncode:
        said = " ".join(next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}").split())
        return None, f"{runtime} {READERS[runtime][0]} failed: {said}"
    labels = labels_in(done.stdout)
    return labels, None if labels is not None else f"{runtime} tells none"


def labels_in(said: str) -> dict[str, str] | None:
    """Out of what `apptainer inspect --json --labels` or `docker image inspect` prints; None where that is something else."""
    try:
        facts = json.loads(said)
        labels = facts[0]["Config"]["Labels"] if isinstance(facts, list) else facts["data"]["attributes"]["labels"]
        return {str(name): str(value) for name, value in labels.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
