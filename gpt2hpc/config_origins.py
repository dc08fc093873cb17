"""Whence each setting has its value: a default, a preset, a --config file, the run's own file or a flag. For dry runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gpt2hpc import config_io
from gpt2hpc.config import Config
from gpt2hpc.run_dir import RunDir

DEFAULT, FLAG = "default", "flag"


def lines(config: Config, argv: Sequence[str], run: RunDir) -> Iterator[str]:
    """`section.key = value (origin)`, in the order of the settings, for words that `config_io.parse` has taken."""
    origins = _origins(argv, run)
    for key, value in config_io.flat(dataclasses.asdict(config)):
        yield f"{key} = {_shown(value)} ({origins[key]})"


def _origins(argv: Sequence[str], run: RunDir) -> dict[str, str]:
    """Of each setting, by its dotted key; later wins, as for the settings themselves."""
    known = dict(config_io.flat(dataclasses.asdict(Config())))
    origins = dict.fromkeys(known, DEFAULT)
    if run.config.exists():
        origins |= dict.fromkeys(_keys(run.config), "the run's config.yaml")
    names = {str(path): f"preset {name}" for name, path in config_io.presets().items()}
    words = iter(config_io.ordered(argv))
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if word == "--config":
            path = next(words)
            origins |= dict.fromkeys(_keys(Path(path)), names.get(path, path))
        elif word.startswith("--") and name in known:
            origins[name] = FLAG
    return origins


def _keys(path: Path) -> list[str]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return [key for key, _ in config_io.flat(tree)]


def _shown(value: Any) -> str:
    """As a flag takes it: text as it is, else null, true, false or a number."""
    return value if isinstance(value, str) and value else json.dumps(value)
