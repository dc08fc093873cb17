"""Settings from presets, YAML files and flags, by jsonargparse; and back to YAML.

Later wins: defaults, `--preset`, `--config` files in their order, flags.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from gpt2hpc import config_errors, durable
from gpt2hpc.config import Config
from gpt2hpc.config_rules import check
from gpt2hpc.errors import ConfigError, UsageError
from gpt2hpc.run_dir import RunDir

SHORT_FLAGS = {
    "--device": "--train.device",
    "--steps": "--train.total_steps",
    "--seed": "--train.seed",
    "--init": "--train.init",
    "--resume": "--checkpoint.resume",
}
SHORT_SWITCHES = {"--deterministic": "--train.deterministic=true"}

EPILOG = (
    "Short forms: --device D, --steps N, --seed N, --init I, --deterministic for train.*, --resume R for checkpoint.resume. "
    "Presets: {presets}. Exit codes: 0 finished, 3 config, 4 data, 5 diverged, 6 stopped, 7 gave up, 8 missing, "
    "9 run directory; docs/exit-codes.md has them all."
)

_SEXAGESIMAL = re.compile(r"\d+(?::\d+)+")
"""YAML 1.1 reads 12:30:00 as 45000."""

MAY_CHANGE = (
    "train.total_tokens",
    "train.total_steps",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.shard_optimizer",
    "train.device",
    "train.precision",
    "train.compile",
    "train.cuda_graphs",
    "train.deterministic",
    "train.log_every",
    "train.eval_every",
    "train.hellaswag",
    "train.hellaswag_every",
    "train.hellaswag_examples",
    "train.sample_every",
    "train.tensorboard",
    "train.wandb",
    "train.trace_data",
    "train.preflight",
    "train.min_allreduce_gb_s",
    "data.dir",
    "data.stage",
    "data.cache_dir",
    "data.cache_gib",
    "data.patience_s",
    "data.verify",
    "checkpoint.",
    "requeue.",
)
"""Settings that a run may be continued with: its length, where and how often; never its mathematics or its data."""


def presets() -> dict[str, Path]:
    """Name and file of each preset in the package."""
    folder = Path(str(resources.files("gpt2hpc") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def new_parser(verb: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser to which a verb adds its own options; `parse` adds the settings."""
    parser = jsonargparse.ArgumentParser(
        prog=f"gpt2hpc {verb}",
        usage=f"gpt2hpc {verb} [--preset NAME] [--run-dir DIR] [--OPTION …] [--SECTION.SETTING VALUE …]",
        description=description,
        exit_on_error=False,
        epilog=EPILOG.format(presets=", ".join(presets())),
        default_env=False,
        allow_abbrev=False,
    )
    return parser


def parse(parser: jsonargparse.ArgumentParser, argv: Sequence[str]) -> tuple[jsonargparse.Namespace, Config]:
    """Parse `argv` into the verb's own options and the settings.

    The settings are added to the parser here, so that its help names the verb's own options first. In the directory of
    an existing run its stored settings are the base, so that only what is named can differ. Raises UsageError for an
    unknown option and ConfigError for a wrong setting, each with the nearest right name.
    """
    add_settings(parser)
    arguments = list(ordered(argv))
    namespace = _parsed(parser, arguments)
    run_dir = namespace.get("run_dir")
    if run_dir is not None:
        if not run_dir.strip():
            raise UsageError("--run-dir is empty; is a variable unset? Name a directory, such as --run-dir runs/mine")
        stored = RunDir(Path(run_dir)).config
        if stored.exists():
            namespace = _parsed(parser, ["--config", str(stored), *arguments])
    return namespace, _build(parser, namespace)


def names_settings(argv: Sequence[str]) -> bool:
    """Whether these words, which `parse` has taken, name a preset, a file or a setting, and not options of a verb alone."""
    names = [word.partition("=")[0] for word in ordered(argv) if word.startswith("--")]
    return any(name == "--config" or name.removeprefix("--").partition(".")[0] in _sections() for name in names)


def add_settings(parser: jsonargparse.ArgumentParser) -> None:
    """Add `--preset`, `--config` and every setting."""
    parser.add_argument("--preset", type=str, help="Settings of a size; the presets are named at the end.")
    parser.add_argument("--config", action="config", help="YAML file with settings; may be given more than once.")
    parser.add_class_arguments(Config)
    for action in parser._actions:
        if action.dest in _sections() or action.dest == "print_config":
            action.help = jsonargparse.SUPPRESS


def _parsed(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> jsonargparse.Namespace:
    try:
        return parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise config_errors.explained(str(error), parser) from None


def changes(run: RunDir, config: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which `config` differs from the settings that the run has, with both values.

    Raises ConfigError, naming the keys, where they must not differ: once the run has saved something.
    """
    if not run.config.exists() or not run.has_checkpoints:
        return {}
    changed = differences(load(run.config), config)
    if refused := {key: values for key, values in changed.items() if not may_change(key)}:
        listed = ", ".join(f"{key}={new} (the run has {old})" for key, (old, new) in refused.items())
        raise ConfigError(
            f"the run in {run.path} began with other settings: {listed}; drop them, or choose another --run-dir"
        )
    return changed


def load(path: Path) -> Config:
    """The settings in a `config.yaml`; ConfigError where it is damaged or has a wrong key."""
    parser = new_parser("config", "")
    add_settings(parser)
    try:
        return _build(parser, parser.parse_path(str(path)))
    except (jsonargparse.ArgumentError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {config_errors.explained(str(error), parser)}") from None


def dump(config: Config) -> str:
    """The settings as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def store(config: Config, path: Path) -> None:
    """Write the settings, whole or not at all."""
    durable.publish_text(path, f"# The resolved settings of this run; training reads only these.\n{dump(config)}")


def differences(stored: Config, given: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    old, new = dict(flat(dataclasses.asdict(stored))), dict(flat(dataclasses.asdict(given)))
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of this setting."""
    return any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in MAY_CHANGE)


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def ordered(argv: Sequence[str]) -> Iterator[str]:
    """Presets first, then files, then flags; short forms spelled out."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--time":  # a length of time, not a setting
            rest += [name, value if equals else next(words, "")]
            continue
        if _SEXAGESIMAL.fullmatch(value or word):
            raise UsageError(f"{word} would be read as a number of base 60; write a plain number")
        if name in ("--preset", "--config"):
            value = value if equals else next(words, "")
            if name == "--preset":
                yield from ("--config", str(_preset_file(value)))
            else:
                files += ["--config", _readable(value)]
        elif name.startswith("--") and (section := name.removeprefix("--")) in _sections():
            raise UsageError(
                f"{name} is a group of settings; name one, such as {name}.{next(iter(vars(getattr(Config(), section))))}"
            )
        elif name in SHORT_FLAGS:
            rest.append(f"{SHORT_FLAGS[name]}{equals}{value}")
        else:
            rest.append(SHORT_SWITCHES.get(word, word))
    yield from files
    yield from rest


def _preset_file(name: str) -> Path:
    known = presets()
    if name not in known:
        raise UsageError(
            f"--preset={name} is unknown; {config_errors.nearest(name, list(known))}the presets are {', '.join(known)}"
        )
    return known[name]


def _readable(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config={path} cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--config={path} is not YAML: {_one_line(error)}") from None
    if match := re.search(r":\s*(\d+(?::\d+)+)\s*(?:#.*)?$", text, re.MULTILINE):
        raise ConfigError(f"--config={path}: {match[1]} would be read as a number of base 60; write a plain number")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config={path} holds no settings; write sections such as `model:` with `n_layer: 12` below"
        )
    for section, settings in tree.items():
        if "." in str(section):
            first, _, rest = str(section).partition(".")
            raise ConfigError(f"--config={path}: write {rest} indented below `{first}:` instead of {section}")
        if section not in _sections():
            raise config_errors.wrong_key(
                f"{section}.{next(iter(settings))}" if isinstance(settings, dict) and settings else str(section)
            )
        if not isinstance(settings, dict):
            raise ConfigError(
                f"--config={path}: {section}={settings} holds no settings; write them indented below `{section}:`"
            )
    return path


def _build(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace) -> Config:
    sections = parser.instantiate(namespace)
    config = Config(**{name: sections[name] for name in _sections()})
    for key, value in flat(dataclasses.asdict(config)):
        if value is None and "null" not in config_errors.kind(key):
            raise ConfigError(f"{key}=null is not valid; it takes {config_errors.kind(key)}")
    check(config)
    return config


def _sections() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
