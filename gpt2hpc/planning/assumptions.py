"""What a plan rests on: each number with its unit, and whether it was given, is the site's, was measured or is assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gpt2hpc.errors import UsageError

FLAG, SITE, SETTINGS, MEASURED, DEFAULT = "flag", "site", "settings", "measured", "default"


@dataclass(frozen=True)
class Measured:
    """A number that a run has shown; `how` says from what it was taken."""

    value: float
    how: str


@dataclass(frozen=True)
class Assumption:
    """`name` is the flag or the setting that changes it."""

    name: str
    value: Any
    unit: str
    origin: str
    source: str = ""


class Assumptions:
    """Picks the numbers of a plan, and remembers whence.

    Args:
        options: The command line's, by their names; None where not given.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.all: list[Assumption] = []

    def pick(
        self, name: str, unit: str, *, default: float, source: str, measured: Measured | None = None, least: float = 0.0
    ) -> float:
        """The flag's value, else the measured one, else the default. UsageError for a flag that is not above `least`."""
        given = self._options.get(name)
        flag = f"--{name.replace('_', '-')}"
        if given is not None:
            if not least < given < math.inf:
                raise UsageError(f"{flag}={given:g} must be above {least:g}")
            return self._note(flag, given, unit, FLAG)
        if measured is not None:
            return self._note(flag, measured.value, unit, MEASURED, measured.how)
        return self._note(flag, default, unit, DEFAULT, source)

    def has(self, name: str) -> bool:
        """Whether a flag gives it."""
        return self._options.get(name) is not None

    def note(self, name: str, value: Any, unit: str, origin: str, source: str = "") -> None:
        """Remember a number that was picked elsewhere."""
        self.all.append(Assumption(name, value, unit, origin, source))

    def _note(self, name: str, value: float, unit: str, origin: str, source: str = "") -> float:
        self.note(name, value, unit, origin, source)
        return value
