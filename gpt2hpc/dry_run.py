"""What a dry run of `gpt2hpc submit` prints: a script or a command, and above it, as comments, each value with its origin."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from gpt2hpc import cli
from gpt2hpc.cluster.launch import LocalJob


def with_sections(script: str, sections: Mapping[str, Iterable[str]]) -> str:
    """A batch script with comments below its first line, a section a title; still a script, and the same one."""
    shebang, _, rest = script.partition("\n")
    return f"{shebang}\n{comments(sections)}\n{rest}"


def comments(sections: Mapping[str, Iterable[str]]) -> str:
    """Lines of shell comment; what would be several lines, such as a variable's value, is one."""
    said = []
    for title, lines in sections.items():
        said += [f"# {title}:", *(f"# {' '.join(line.splitlines())}" for line in lines), "#"]
    return "\n".join(said)


def local_text(job: LocalJob, settings: Iterable[str]) -> str:
    """What would run on this machine, for a person to read."""
    variables = job.environment(0, restart=0, rendezvous="<temporary file>", job_end=None)
    return "\n".join(
        [
            comments({f"Settings, each with its origin ({job.run.config})": settings}),
            f"# Environment of rank 0, from the launcher; the other ranks of {job.nproc} differ in RANK and LOCAL_RANK.",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            f"# Started {cli.plural(job.nproc, 'time')}, once for each rank.",
            shlex.join(job.command),
        ]
    )
