"""One thing that was looked at before a training needs it, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["OK", "WARN", "MISSING"]


@dataclass(frozen=True)
class Finding:
    """MISSING says what to do about it, WARN what may go wrong or why it is not known."""

    name: str
    state: State
    text: str

    @property
    def line(self) -> str:
        return f"{self.state:8}{self.name}: {self.text}"


def ok(name: str, text: str) -> Finding:
    return Finding(name, "OK", text)


def warn(name: str, text: str) -> Finding:
    return Finding(name, "WARN", text)


def missing(name: str, text: str) -> Finding:
    return Finding(name, "MISSING", text)
