"""What differs from cluster to cluster, in one YAML file: `--site`, `$GPT2HPC_SITE` or `~/.config/gpt2hpc/site.yaml`.

partition: gpu
account: proj42
gpus_per_node: 4
image: /project/proj42/gpt2hpc.sif
binds: [/project, /scratch]
environment: {NCCL_SOCKET_IFNAME: hsn}
setup: [module load apptainer]
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2hpc.errors import ConfigError

Runtime = Literal["apptainer", "singularity", "none"]
VARIABLE = "GPT2HPC_SITE"
OWNED = (
    *("array", "chdir", "error", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "requeue", "signal", "time", "wrap"),
)
"""Options of sbatch that the job's workings rest on, or that have a flag of their own."""


@dataclass(frozen=True)
class Site:
    """A cluster's ways; each field may be absent.

    Args:
        partition: As sbatch's option of that name; so are account, qos and constraint.
        gpus_per_node: GPUs to ask for on each node.
        gpu_directive: What the cluster wants to be asked for GPUs by.
        cpus_per_task: CPU cores a rank.
        time: Time limit of a job.
        sbatch: Any other option of sbatch, by its long name.
        runtime: What runs the image.
        image: The container image; without one, Python runs as it is.
        binds: Directories to make visible in the container, `SOURCE` or `SOURCE:TARGET`.
        python: The Python to use without an image; that of `gpt2hpc submit` if absent.
        environment: Variables to set in the job, inside a container too.
        setup: Lines of shell before anything else, such as `module load`.
        master_addr_suffix: Appended to the first node's name where another name means the fast network.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None
    gpu_directive: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    cpus_per_task: int | None = None
    time: str | None = None
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    runtime: Runtime = "apptainer"
    image: str | None = None
    binds: tuple[str, ...] = ()
    python: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    master_addr_suffix: str = ""
    path: Path | None = None

    def image_to_use(self, option: str | None, *, binds: Sequence[Path]) -> str | None:
        """The container image to run in; ConfigError for one that is missing, or without which the site's Python is."""
        named = None if option == "none" or self.runtime == "none" else option or self.image
        if named is None:
            if self.python and not Path(self.python).exists():
                raise ConfigError(
                    f"site profile {self.path}: python={self.python} does not exist; name one that has gpt2hpc"
                )
            return None
        image = os.path.abspath(Path(named).expanduser())  # noqa: PTH100 -- links stay as they are
        if not Path(image).exists():
            raise ConfigError(f"container image {image} does not exist; build it, or give another with --container")
        for path in (image, *(os.path.abspath(bind) for bind in binds)):  # noqa: PTH100
            if set(path) & set(",:"):
                raise ConfigError(
                    f"{path} has a comma or a colon, which a container's --bind cannot; choose another path"
                )
        return image


def find(option: str | None, env: Mapping[str, str]) -> Site:
    """The profile that is asked for, else the user's own, else an empty one. ConfigError where it is missing or wrong."""
    for named, source in ((option, "--site"), (env.get(VARIABLE), VARIABLE)):
        if named:
            path = Path(named).expanduser()
            if not path.is_file():
                raise ConfigError(f"{source}={named} is not a file; give the path of a site profile (YAML)")
            return load(path)
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "~")).expanduser() / ".config")
    own = home / "gpt2hpc" / "site.yaml"
    return load(own) if own.is_file() else Site()


def load(path: Path) -> Site:
    """Raises ConfigError naming file, key, value and mend."""
    try:
        # Every value as it is written: YAML's own reading makes 12:30:00 a number and NO a boolean.
        facts = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"site profile {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"site profile {path} holds no settings; write lines such as `partition: gpu`")
    kinds = {each.name: each for each in dataclasses.fields(Site) if each.name != "path"}
    values: dict[str, Any] = {}
    for key, value in facts.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"site profile {path}: unknown key {key}; {hint}the keys are {', '.join(kinds)}")
        if value not in ("", "null", "~"):
            values[key] = _checked(path, key, value)
    return Site(**values, path=path)


def _checked(path: Path, key: str, value: Any) -> Any:
    """The value as its field has it."""

    def wrong(wanted: str) -> ConfigError:
        return ConfigError(f"site profile {path}: {key}={value!r} is not valid; it takes {wanted}")

    kind = typing.get_type_hints(Site)[key]
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise wrong("one of " + ", ".join(typing.get_args(kind)))
        return value
    if key in ("binds", "setup"):
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) for each in listed):
            raise wrong("a list of texts")
        return tuple(os.path.expandvars(each) if key == "binds" else each for each in listed)
    if key in ("environment", "sbatch"):
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise wrong("names with values, as `NAME: value`")
        for name in value:
            if key == "environment" and not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise wrong(f"names of variables; {name!r} is none")
            if name.replace("_", "-") in OWNED and key == "sbatch":
                raise wrong(f"options that gpt2hpc does not set itself; drop {name}")
        return value
    if isinstance(value, list | dict):
        raise wrong("a text")
    if key in ("gpus_per_node", "cpus_per_task"):
        if not value.isdecimal() or int(value) < (key == "cpus_per_task"):
            raise wrong("a whole number")
        return int(value)
    return os.path.expandvars(value) if key in ("image", "python") else value
