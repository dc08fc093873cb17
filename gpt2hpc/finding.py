"""One thing that was looked at or tried before a training needs it, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gpt2hpc import durable

State = Literal["OK", "WARN", "MISSING", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """MISSING and FAIL say what to do about it, WARN what may go wrong or why it is not known."""

    name: str
    state: State
    text: str

    @property
    def line(self) -> str:
        return f"{self.state:8}{self.name}: {self.text}"


@dataclass(frozen=True)
class Timed(Finding):
    """What a trial came to, and how long it took."""

    seconds: float

    @property
    def line(self) -> str:
        return f"{self.state:8}{self.seconds:6.1f} s  {self.name}: {self.text}"


def ok(name: str, text: str) -> Finding:
    return Finding(name, "OK", text)


def warn(name: str, text: str) -> Finding:
    return Finding(name, "WARN", text)


def missing(name: str, text: str) -> Finding:
    return Finding(name, "MISSING", text)


def to_json(findings: Iterable[Finding]) -> str:
    """A list of objects, for other programs."""
    return durable.to_json([dataclasses.asdict(finding) for finding in findings]).rstrip()
