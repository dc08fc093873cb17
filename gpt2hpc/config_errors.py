"""What is wrong with a setting, as one line that names the nearest right name: jsonargparse's words in ours."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any

import jsonargparse

from gpt2hpc.config import Config
from gpt2hpc.errors import ConfigError, UsageError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def explained(message: str, parser: jsonargparse.ArgumentParser) -> ConfigError | UsageError:
    """The parser's words as one line of ours, with the nearest right name."""
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        word = match[1].partition("=")[0]
        options = [option for action in parser._actions for option in action.option_strings]
        return UsageError(f"unknown option {word}; {nearest(word, options)}see --help")
    if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return wrong_key(f"{match[1]}.{match[2]}")
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return wrong_key(match[1])
    if match := re.search(r'Parser key "([\w.]+)"', message):
        value = re.search(r"(?:Given value|Got value): (.*)\s*$", message)
        given = value[1] if value else "?"
        if match[1] in _known_keys():
            return ConfigError(f"{match[1]}={given} is not valid; it takes {kind(match[1])}")
        kinds = {action.dest: action for action in parser._actions}
        option = f"--{match[1].replace('_', '-')}"
        return UsageError(f"{option}={given} is not valid; it takes {_option_kind(kinds.get(match[1]))}")
    return UsageError(" ".join(message.split()))


def kind(key: str) -> str:
    """What a setting takes, in words."""
    hint: Any = Config
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part, str) if dataclasses.is_dataclass(hint) else hint
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(options)
    return " or ".join(map(_word, options or (hint,)))


def _word(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(typing.get_args(hint))
    return _WORDS.get(hint, str(hint))


def _option_kind(action: Any) -> str:
    """What an option of a verb takes, in words."""
    hint = getattr(action, "_typehint", None) or getattr(action, "type", None)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return _WORDS.get(hint, "another value; see --help") if isinstance(hint, type) else "another value; see --help"


def wrong_key(key: str) -> ConfigError:
    return ConfigError(f"unknown setting {key}; {nearest(key, _known_keys())}--help lists them all")


def nearest(word: str, known: Sequence[str]) -> str:
    """The right name for a wrong one: `--n_layer` means `--model.n_layer`, and a typo what it is nearest to."""
    bare = word.lstrip("-").rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == bare]
    near = same[:1] or difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"did you mean {near[0]}? " if near else ""


def _known_keys() -> list[str]:
    return [f"{section}.{key}" for section, settings in dataclasses.asdict(Config()).items() for key in settings]
