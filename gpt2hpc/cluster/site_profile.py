"""What differs from cluster to cluster, in one YAML file: `--site`, `$GPT2HPC_SITE` or `~/.config/gpt2hpc/site.yaml`.

A name of those in `presets/sites/` will do as well, where no file has it; `gpt2hpc init` writes a profile by asking the cluster.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2hpc.cluster import script
from gpt2hpc.errors import ConfigError

Runtime = Literal["apptainer", "singularity", "pyxis", "docker", "none"]
OF_SIF: tuple[Runtime, ...] = ("apptainer", "singularity")
"""Those that build and run a SIF: one program by two names."""
VARIABLE = "GPT2HPC_SITE"
OWNED = (
    *("array", "chdir", "error", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "requeue", "signal", "time", "wrap"),
)
"""Options of sbatch that the job's workings rest on, or that have a flag of their own."""
OWNED_OF_SRUN = (
    *(argument.removeprefix("--").partition("=")[0] for argument in script.SRUN_ARGS),
    *("error", "input", "label", "nodes", "ntasks", "ntasks-per-node", "output", "unbuffered"),
)
"""Options of srun that do."""
SECRET = re.compile(r"(?i)(^|_)(token|secret|password|passwd|(api|access|private|secret)_?key)$")
"""Names of variables whose values belong into no file that others may read."""


IN_SCRIPTS = (
    "which would stand in every batch script; drop it: what you export where you submit reaches the job by itself, or name a file "
    "that only you may read (HF_TOKEN_PATH, NETRC)"
)
"""Why a secret has no place in a profile, and what to do instead."""
_ASSIGNED = re.compile(r"""(?<![\w$])([A-Za-z_]\w*)=["']?([^\s"';&|]*)""")
_OF_THE_HUB = re.compile(r"hf_[A-Za-z0-9]{20,}")


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
        srun: Any other option of srun, by its long name, such as `cpu-bind`.
        runtime: What runs the image; pyxis is a plugin of srun; docker may be root's podman by that name.
        image: The container image; without one, Python runs as it is.
        binds: Directories to make visible in the container, `SOURCE` or `SOURCE:TARGET`.
        python: The Python to use without an image; that of `gpt2hpc submit` if absent.
        environment: Variables to set in the job, inside a container too; their values may name those of who submits.
        setup: Lines of shell before anything else, such as `module load`.
        master_addr_suffix: Appended to the first node's name where another name means the fast network.
        offline: The compute nodes have no internet: the Hub's client does not try.
        purged: Directories whose files the site deletes, and after how many days.
        min_allreduce_gb_s: Bus bandwidth of an all-reduce, in GB/s, below which something is wrong with the network.
        path: The profile's file.
        given: The keys that stand in it.
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
    srun: Mapping[str, str] = field(default_factory=dict)
    runtime: Runtime = "apptainer"
    image: str | None = None
    binds: tuple[str, ...] = ()
    python: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    master_addr_suffix: str = ""
    offline: bool = False
    purged: Mapping[str, int] = field(default_factory=dict)
    min_allreduce_gb_s: float | None = None
    path: Path | None = None
    given: frozenset[str] = frozenset()

    def gpu_request(self, gpus: int | None) -> dict[str, Any]:
        """So many GPUs on each node, as options of sbatch in the words that the cluster takes; none for none."""
        if not gpus:
            return {}
        return {"gres": f"gpu:{gpus}"} if self.gpu_directive == "gres" else {"gpus_per_node": gpus}

    def image_to_use(self, option: str | None, *, binds: Sequence[Path]) -> str | None:
        """The container image to run in; ConfigError for one that is missing, or without which the site's Python is."""
        named = None if option == "none" or self.runtime == "none" else option or self.image
        if named is None:
            if self.python and not Path(self.python).exists():
                raise ConfigError(
                    f"site profile {self.path}: python={self.python} does not exist; name one that has gpt2hpc"
                )
            return None
        image = named
        if self.runtime == "docker":
            if named.startswith(("/", ".")) or named.endswith(".sif"):
                raise ConfigError(
                    f"container image {named} is a file, and runtime=docker takes the name of an image; load it (`docker load`), or "
                    "give --runtime apptainer"
                )
        elif not (self.runtime == "pyxis" and re.search(r"#|://|^[\w.-]+:[\w.-]+$", named)):  # of a registry
            image = os.path.abspath(Path(named).expanduser())  # noqa: PTH100 -- links stay as they are
            if not Path(image).exists():
                raise ConfigError(f"container image {image} does not exist; build it, or give another with --container")
        paths = [os.path.abspath(bind) for bind in binds]  # noqa: PTH100
        for path in (*([image] if image.startswith("/") else []), *paths):
            if set(path) & set(",:"):
                raise ConfigError(
                    f"{path} has a comma or a colon, which a container's --bind cannot; choose another path"
                )
        return image


def shipped() -> dict[str, Path]:
    """Name and file of each example in the package."""
    folder = Path(str(resources.files("gpt2hpc") / "presets" / "sites"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def own_path(env: Mapping[str, str]) -> Path:
    """Where a user's own profile is, if there is one."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "~")).expanduser() / ".config")
    return home / "gpt2hpc" / "site.yaml"


def find(option: str | None, env: Mapping[str, str]) -> Site:
    """The profile that is asked for, else the user's own, else an empty one. ConfigError where it is missing or wrong."""
    for named, source in ((option, "--site"), (env.get(VARIABLE), VARIABLE)):
        if named:
            path = Path(named).expanduser()
            if not path.is_file():
                path = shipped().get(named, path)
            if not path.is_file():
                near = difflib.get_close_matches(named, shipped(), n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(
                    f"{source}={named} is not a file, and not the name of an example; {hint}give the path of a site profile "
                    f"(YAML; `gpt2hpc init` writes one), or one of {', '.join(shipped())}"
                )
            return load(path)
    own = own_path(env)
    return load(own) if own.is_file() else Site()


def load(path: Path) -> Site:
    """Raises ConfigError naming file, key, value and mend."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"site profile {path} cannot be read: {' '.join(str(error).split())}") from None
    return read(text, path)


def read(text: str, path: Path) -> Site:
    """The profile that `text` is, or would be in the file of that name; ConfigError as for one that is there."""
    try:
        # Every value as it is written: YAML's own reading makes 12:30:00 a number and NO a boolean.
        facts = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"site profile {path}{_broken(error)}") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"site profile {path} holds no settings; write lines such as `partition: gpu`")
    kinds = {each.name: each for each in dataclasses.fields(Site) if each.name not in ("path", "given")}
    values: dict[str, Any] = {}
    for key, value in facts.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"site profile {path}: unknown key {key}; {hint}the keys are {', '.join(kinds)}")
        _refuse_secrets(path, key, value)
        if value not in ("", "null", "~"):
            values[key] = _checked(path, key, value)
    return Site(**values, path=path, given=frozenset(values))


def _broken(error: yaml.YAMLError) -> str:
    """The place in the file, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f" cannot be read: {' '.join(str(error).split())}"
    return (
        f", line {mark.line + 1}: {getattr(error, 'problem', None) or 'no YAML'}; mend it there, or in the line before"
    )


def _refuse_secrets(path: Path, key: str, value: Any) -> None:
    """Raise ConfigError for a secret that is written out; what names a variable or a file reveals nothing."""
    lines = value if isinstance(value, list) else [value]
    found = [str(line) for line in lines if _OF_THE_HUB.search(str(line))]
    assigned = [match for line in lines for match in _ASSIGNED.finditer(str(line))] if key == "setup" else []
    secret = [match[1] for match in assigned if SECRET.search(match[1]) and match[2] and match[2][0] not in "$`"]
    if secret or found:
        what = f"the value of {secret[0]}" if secret else "what looks like a token of the Hub"
        raise ConfigError(f"site profile {path}: {key} has {what}, {IN_SCRIPTS}")


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
    if key in ("environment", "sbatch", "srun", "purged"):
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise wrong("names with values, as `NAME: value`")
        return _purged(value, wrong) if key == "purged" else _named(path, key, value, wrong)
    if isinstance(value, list | dict):
        raise wrong("a text")
    if key in ("gpus_per_node", "cpus_per_task"):
        if not value.isdecimal() or int(value) < (key == "cpus_per_task"):
            raise wrong("a whole number")
        return int(value)
    if key == "min_allreduce_gb_s":
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            raise wrong("a number of GB/s, such as 20")
        return float(value)
    if key == "offline":
        if value.lower() not in ("true", "false"):
            raise wrong("true or false")
        return value.lower() == "true"
    return os.path.expandvars(value) if key in ("image", "python") else value


def _named(path: Path, key: str, given: dict[str, str], wrong: Callable[[str], ConfigError]) -> dict[str, str]:
    owned = {"sbatch": OWNED, "srun": OWNED_OF_SRUN}.get(key, ())
    for name in given:
        if key == "environment" and not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise wrong(f"names of variables; {name!r} is none")
        if key == "environment" and SECRET.search(name):
            raise ConfigError(f"site profile {path}: environment has {name}, {IN_SCRIPTS}")
        if name.replace("_", "-") in owned:
            raise wrong(f"options that gpt2hpc does not set itself; drop {name}")
    return {name: os.path.expandvars(value) for name, value in given.items()} if key == "environment" else given


def _purged(given: dict[str, str], wrong: Callable[[str], ConfigError]) -> dict[str, int]:
    """Directories and days; one whose variable is not set here, as on a machine that is no login node, is left out."""
    found = {}
    for name, days in given.items():
        directory = os.path.expandvars(name)
        if not days.isdecimal():
            raise wrong(f"directories and days, as `/scratch: 30`; {days!r} is no number of days")
        if directory.startswith("/"):
            found[directory] = int(days)
        elif not directory.startswith("$"):
            raise wrong(f"absolute directories and days, as `/scratch: 30`; {name!r} is not absolute")
    return found
