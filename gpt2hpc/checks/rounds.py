"""All checks, at once, each kind with a time limit of its own: a disk or a daemon that hangs holds up nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gpt2hpc import cli
from gpt2hpc.checks import asked, container, disk, interpreter, limits, python, ranks, slurm, tokens
from gpt2hpc.checks.scene import Scene
from gpt2hpc.finding import Finding, warn

Check = Callable[[Scene], list[Finding]]


@dataclass(frozen=True)
class Group:
    """Checks of one kind.

    Args:
        title: As it is printed.
        check: Returns what it finds.
        patience_s: Seconds after which it is given up; above what the programs that it asks are given.
    """

    title: str
    check: Check
    patience_s: float = 75.0


def _hub(scene: Scene) -> list[Finding]:
    from gpt2hpc.training import hub_access

    repo = scene.config.checkpoint.repo
    return [] if repo is None else list(hub_access.examine(repo, create=False))


GROUPS = (
    Group("Slurm", slurm.look),
    Group("What a job would ask for", asked.look, patience_s=100.0),
    Group("Container", container.look),
    Group("Ranks", ranks.look, patience_s=interpreter.PATIENCE_S + 30.0),
    Group("Disks", disk.look),
    Group("Limits of this shell", limits.look),
    Group("Python", python.look),
    Group("Tokenizer and data", tokens.look),
)
HUB = Group("The Hub", _hub, patience_s=60.0)


def groups_for(scene: Scene) -> list[Group]:
    """The Hub is asked only where the run is to use it."""
    return [*GROUPS, *([] if scene.config.checkpoint.repo is None else [HUB])]


def made(groups: Sequence[Group], scene: Scene) -> Iterator[tuple[Group, list[Finding]]]:
    """Each group with what it found, in order; a check that breaks, or does not end, is a warning."""
    started = time.monotonic()
    results: dict[str, list[Finding]] = {}
    threads = [threading.Thread(target=_run, args=(group, scene, results), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for group, thread in zip(groups, threads, strict=True):
        thread.join(max(0.0, group.patience_s - (time.monotonic() - started)))
        late = [warn(group.title, f"nothing was found out in {group.patience_s:g} s; does a disk or a daemon hang?")]
        yield group, results.get(group.title, late)


def page(heading: Sequence[str], reports: Sequence[tuple[Group, Sequence[Finding]]], every: Sequence[Finding]) -> str:
    """What was found as text, for a person to read and for grep; `every` finding is counted at the end, those of the heading too."""
    lines = list(heading)
    for group, findings in reports:
        if findings:
            lines += ["", group.title, *(finding.line for finding in findings)]
    states = [finding.state for finding in every]
    return "\n".join([*lines, "", f"{states.count('MISSING')} missing, {cli.plural(states.count('WARN'), 'warning')}"])


def _run(group: Group, scene: Scene, results: dict[str, list[Finding]]) -> None:
    try:
        results[group.title] = group.check(scene)
    except Exception as error:  # whatever is wrong with a machine, the other checks are worth having
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        results[group.title] = [warn(group.title, f"this check broke, which is a bug of gpt2hpc's: {said}")]
