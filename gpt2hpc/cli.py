"""What every verb shares: how it ends, and how it speaks to a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from gpt2hpc.errors import EXIT_CODES, Gpt2hpcError, StoppedError

Main = Callable[[Sequence[str]], int]


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run a verb; an error of the user's becomes one line on stderr and its exit code, a bug keeps its traceback."""
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except Gpt2hpcError as error:
        print(f"gpt2hpc: error: {error.line}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("gpt2hpc: interrupted", file=sys.stderr, flush=True)
        return StoppedError.exit_code
    except BrokenPipeError:  # `gpt2hpc status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def say(text: str) -> None:
    """A line of progress, seen at once."""
    print(text, flush=True)


def warn(text: str) -> None:
    print(f"gpt2hpc: warning: {text}", file=sys.stderr, flush=True)


def exit_code_table() -> str:
    """The exit codes, as in `docs/exit-codes.md`."""
    return "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
