"""What every verb shares: how it ends, and how it speaks to a terminal."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from gpt2hpc import garbage
from gpt2hpc.errors import EXIT_CODES, Gpt2hpcError, StoppedError, UsageError, as_users

Main = Callable[[Sequence[str]], int]

EXAMPLES = "examples:"
QUIET_HELP = "Say nothing but warnings, and how it ends."
_quiet = False


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run a verb; an error of the user's becomes one line on stderr and its exit code, a bug keeps its traceback."""
    _write_whole_lines()
    try:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except OSError as error:
            raise as_users(error) from error
    except Gpt2hpcError as error:
        _print(f"gpt2hpc: error: {error.line}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _print("gpt2hpc: interrupted", sys.stderr)
        return StoppedError.exit_code
    finally:
        garbage.leave()


def _write_whole_lines() -> None:
    """Under `python -u` or PYTHONUNBUFFERED a line's end is a write of its own, of which `srun --label` makes an empty line.

    What the terminal's encoding lacks is written as its number, as Python does on stderr, rather than ending the verb.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.write_through:
                stream.reconfigure(line_buffering=True, write_through=False)
            if stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")


def say(text: str, end: str = "\n") -> None:
    """A line of progress, or a part of it, seen at once."""
    _print(text, sys.stdout, end)


def aside(text: str) -> None:
    """A line beside the output, which may be read by another program."""
    _print(text, sys.stderr)


def note(text: str) -> None:
    """A line that a user may do without, and does with --quiet."""
    if not _quiet:
        say(text)


def be_quiet() -> None:
    """Of --quiet: from now on only warnings, and how it ends."""
    global _quiet
    _quiet = True


def is_quiet() -> bool:
    return _quiet


def is_on_terminal(environ: Mapping[str, str]) -> bool:
    """Whether a person sees what is printed as it is printed, and a line may be drawn over."""
    # What srun --unbuffered gives a task is a terminal too, though it ends in a file.
    return sys.stdout.isatty() and "SLURM_STEP_ID" not in environ and environ.get("TERM", "dumb") != "dumb"


def warn(text: str) -> None:
    _print(f"gpt2hpc: warning: {text}", sys.stderr)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print; once nobody reads (a closed terminal, `| head`), go on in silence: a run must not die of it."""
    try:
        stream.write(text + end)  # in one piece, whatever lines it has
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def check_out(path: Path, *, example: str) -> None:
    """Raise UsageError where `--out` is to be a file, and names a directory."""
    if path.is_dir():
        raise UsageError(f"--out={path} is a directory; name a file in it, as --out {path / example}")


class Parser(argparse.ArgumentParser):
    """A verb's parser, whose errors are one line like all others', and whose options are written out.

    A shortened one may mean another some day, and a verb that hands its words on, as `evaluate` does to its ranks, would not know it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        told = self._in_words(message)
        raise UsageError(f"{told}{'' if told.endswith('?') else ';'} see `{self.prog} --help`")

    def _in_words(self, message: str) -> str:
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            words = match[1].split()
            word = next((each.partition("=")[0] for each in words if each.startswith("-")), words[0])
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word, options, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"unknown option {word}{hint}" if word.startswith("-") else f"{word} is one word too many"
        if match := re.fullmatch(r"argument (\S+): invalid choice: (.*?) \(choose from (.*)\)", message, re.DOTALL):
            return f"{_option(match[1])}={_bare(match[2])} is not valid; it takes one of {_bare(match[3])}"
        if match := re.fullmatch(r"argument (\S+): invalid (\w+) value: (.*)", message, re.DOTALL):
            wanted = {"int": "a whole number", "float": "a number"}.get(match[2], "another value")
            return f"{_option(match[1])}={_bare(match[3])} is not valid; it takes {wanted}"
        if match := re.fullmatch(r"argument (\S+): expected (.*)", message):
            return f"{_option(match[1])} takes {match[2].replace('argument', 'value')}"
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"{match[1]} is missing"
        return message


def _option(names: str) -> str:
    """`--lines` of argparse's `-n/--lines`."""
    return names.rpartition("/")[2] if names.startswith("-") else names


def _bare(words: str) -> str:
    return words.replace("'", "")


def add_examples(parser: argparse.ArgumentParser, *commands: str) -> None:
    """End the parser's help with commands to copy, each as it would be typed, a comment behind it if it needs one."""
    before = f"{parser.epilog}\n\n" if parser.epilog else ""
    parser.epilog = before + "\n".join([EXAMPLES, *(f"  {command}" for command in commands)])
    own: Any = parser.formatter_class
    kept: Any = type("Formatter", (_KeepsExamples, own), {})
    parser.formatter_class = kept


class _KeepsExamples(argparse.HelpFormatter):
    """Fills paragraphs as any parser's help does, but leaves the examples at the end as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        words, examples, commands = text.partition(EXAMPLES)
        filled = super()._fill_text(words, width, indent)
        return "\n\n".join(part for part in (filled, examples + commands) if part)


def exit_code_table() -> str:
    """The exit codes, as in `docs/exit-codes.md`."""
    return "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
