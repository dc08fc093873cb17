"""Is the gpt2hpc that runs a job the one that has submitted it?

Tasks of arrays, evaluations and exports look as they begin, trainings in their preflight.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from gpt2hpc import __version__, cli
from gpt2hpc.cluster import dist_env
from gpt2hpc.cluster.dist_env import SUBMITTED_VERSION
from gpt2hpc.errors import MissingError

EXPORT = f"export {SUBMITTED_VERSION}={__version__} # at the first start what runs must be the same"
"""A line of each batch script."""


def other_version(environ: Mapping[str, str]) -> str | None:
    """What is wrong if another gpt2hpc than this one submitted the job.

    That stands in the batch script, which is the same at each restart, while what is installed may be newer by then.
    """
    submitted = environ.get(SUBMITTED_VERSION)
    if not submitted or submitted == __version__:
        return None
    mend = (
        f"build the image anew with {submitted}"
        if dist_env.is_in_image(environ)
        else f"install {submitted} for the job's Python"
    )
    return f"gpt2hpc {submitted} submitted the job, but its ranks run gpt2hpc {__version__}; {mend}, or submit with {__version__}"


def refuse_other_version(environ: Mapping[str, str]) -> None:
    """Raise MissingError at the first start of a job that another gpt2hpc has submitted; a later start says it and goes on."""
    text = other_version(environ)
    if text is None:
        return
    if environ.get("SLURM_RESTART_COUNT", "0") != "0":
        cli.warn(text)
        return
    raise MissingError(text)


def run_task(main: cli.Main, arguments: Sequence[str], *, waited: bool = False) -> int:
    """A verb as a task of a batch job: the process ends with a documented exit code.

    Of a job that `waited` for others, weeks perhaps, another version is but said. A signal ends it, unless the verb sees
    to that itself, and its batch script decides what then: submitit ignores SIGTERM, so that a preemption would kill all, and requeues
    for itself.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)

    def checked(words: Sequence[str]) -> int:
        if not waited:
            refuse_other_version(os.environ)
        elif text := other_version(os.environ):
            cli.warn(text)
        return main(words)

    if code := cli.run(checked, arguments):
        sys.exit(code)  # submitit turns an exception into exit code 1
    return 0
