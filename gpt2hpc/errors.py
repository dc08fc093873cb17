"""What can go wrong, as the user sees it: one line, and an exit code that scripts can rely on.

A subclass of `Gpt2hpcError` is the user's to mend and is shown as one line that names the key, the value and the mend.
Any other exception is a bug of ours and keeps its traceback (exit code 1).

No code is 85, 128 or above, 144 or 255: those mean something to Slurm, to shells or to submitit.
"""

from __future__ import annotations

import errno
from typing import ClassVar

INTERNAL_ERROR = 1


class Gpt2hpcError(Exception):
    """Base of every error that is shown as one line."""

    exit_code: ClassVar[int] = INTERNAL_ERROR
    meaning: ClassVar[str] = "internal error: a bug, shown with its traceback"

    @property
    def line(self) -> str:
        """The message on a single line."""
        return " ".join(str(self).split())


class UsageError(Gpt2hpcError):
    exit_code = 2
    meaning = "usage: an unknown command or option"


class ConfigError(Gpt2hpcError):
    exit_code = 3
    meaning = "config: a setting is wrong, or differs from the settings of the run"


class DataError(Gpt2hpcError):
    exit_code = 4
    meaning = "data: missing, damaged, or not the data the run began with"


class DivergedError(Gpt2hpcError):
    exit_code = 5
    meaning = "diverged: the loss is not finite; the last good checkpoint is kept"


class StoppedError(Gpt2hpcError):
    exit_code = 6
    meaning = "stopped before the end, with all that was done kept; the same command goes on from it"


class CrashBudgetError(Gpt2hpcError):
    exit_code = 7
    meaning = "gave up: crashed, or was restarted, too often without progress"


class MissingError(Gpt2hpcError):
    exit_code = 8
    meaning = "missing: something is lacking here, such as torch, a GPU or the right to upload to the Hub"


class RunDirError(Gpt2hpcError):
    exit_code = 9
    meaning = "run directory: not writable, or in use by another attempt"


class NodeError(Gpt2hpcError):
    """A node's fault, not the user's: a crash, after which the job starts again, without that node where others are left."""

    exit_code = 10
    meaning = "node: the preflight or the watchdog found one wanting; a job starts again, elsewhere where it can"


class PeerGoneError(Gpt2hpcError):
    """Another rank died: this one's end is a crash like that one's, but not worth a traceback."""


USER_ERRORS: tuple[type[Gpt2hpcError], ...] = (
    UsageError,
    ConfigError,
    DataError,
    DivergedError,
    StoppedError,
    CrashBudgetError,
    MissingError,
    RunDirError,
)

_CODED: tuple[type[Gpt2hpcError], ...] = (*USER_ERRORS, NodeError)

EXIT_CODES: dict[int, str] = {
    0: "finished",
    INTERNAL_ERROR: Gpt2hpcError.meaning,
    **{error.exit_code: error.meaning for error in _CODED},
}


_FORBIDDEN, _FULL = (errno.EACCES, errno.EPERM), (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_users(error: OSError) -> bool:
    """Whether it is a full or read-only disk, or a lack of permission; any other one may pass."""
    return error.errno in (*_FORBIDDEN, *_FULL)


def as_users(error: OSError) -> RunDirError:
    """What is the user's to mend; any other OSError is raised again as it is."""
    if not is_users(error):
        raise error
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in _FORBIDDEN:
        return RunDirError(f"{place}{error.strerror}; choose a place that you may use, or have it opened to you")
    return RunDirError(f"{place}{error.strerror}; free space and do the same again: what was complete before is kept")


def error_for(exit_code: int, message: str) -> Gpt2hpcError:
    """The error of that exit code: how a rank re-raises what rank 0 met."""
    for kind in _CODED:
        if kind.exit_code == exit_code:
            return kind(message)
    return Gpt2hpcError(message)
