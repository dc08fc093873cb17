"""Settings from presets, YAML files and flags, by jsonargparse; and back to YAML.

Later wins: defaults, `--preset`, `--config` files in their order, flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from gpt2hpc import durable
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
    "train.device",
    "train.precision",
    "train.compile",
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
        raise _explained(str(error), parser) from None


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
        raise ConfigError(f"{path}: {_explained(str(error), parser)}") from None


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
        raise UsageError(f"--preset={name} is unknown; {_nearest(name, list(known))}the presets are {', '.join(known)}")
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
            raise _wrong_key(
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
        if value is None and "null" not in _kind(key):
            raise ConfigError(f"{key}=null is not valid; it takes {_kind(key)}")
    check(config)
    return config


def _sections() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _known_keys() -> list[str]:
    return [key for key, _ in flat(dataclasses.asdict(Config()))]


def _explained(message: str, parser: jsonargparse.ArgumentParser) -> ConfigError | UsageError:
    """The parser's words as one line of ours, with the nearest right name."""
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        word = match[1].partition("=")[0]
        options = [option for action in parser._actions for option in action.option_strings]
        return UsageError(f"unknown option {word}; {_nearest(word, options)}see --help")
    if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _wrong_key(f"{match[1]}.{match[2]}")
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _wrong_key(match[1])
    if match := re.search(r'Parser key "([\w.]+)"', message):
        value = re.search(r"(?:Given value|Got value): (.*)\s*$", message)
        given = value[1] if value else "?"
        if match[1] in _known_keys():
            return ConfigError(f"{match[1]}={given} is not valid; it takes {_kind(match[1])}")
        kinds = {action.dest: action for action in parser._actions}
        option = f"--{match[1].replace('_', '-')}"
        return UsageError(f"{option}={given} is not valid; it takes {_option_kind(kinds.get(match[1]))}")
    return UsageError(" ".join(message.split()))


def _kind(key: str) -> str:
    """What a setting takes, in words."""
    kind: Any = Config
    for part in key.split("."):
        kind = typing.get_type_hints(kind).get(part, str) if dataclasses.is_dataclass(kind) else kind
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(options)
    return " or ".join(_WORDS.get(option, str(option)) for option in options or (kind,))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _option_kind(action: Any) -> str:
    """What an option of a verb takes, in words."""
    kind = getattr(action, "_typehint", None) or getattr(action, "type", None)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return _WORDS.get(kind, "another value; see --help") if isinstance(kind, type) else "another value; see --help"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _wrong_key(key: str) -> ConfigError:
    return ConfigError(f"unknown setting {key}; {_nearest(key, _known_keys())}--help lists them all")


def _nearest(word: str, known: Sequence[str]) -> str:
    """The right name for a wrong one: `--n_layer` means `--model.n_layer`, and a typo what it is nearest to."""
    bare = word.lstrip("-").rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == bare]
    near = same[:1] or difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"did you mean {near[0]}? " if near else ""
