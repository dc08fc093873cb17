"""A site profile from what is known of a cluster: a guess for each key, and why."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpt2hpc import cli
from gpt2hpc.cluster.inventory import Partition
from gpt2hpc.cluster.site_facts import Facts
from gpt2hpc.cluster.slurm import minutes
from gpt2hpc.errors import UsageError

DAY_MIN = 24 * 60
WIDTH = 118


@dataclass(frozen=True)
class Guess:
    """A key of the profile: with `sure` it is set, else shown as an example that does nothing."""

    key: str
    value: Any
    why: str
    sure: bool = True

    @property
    def line(self) -> str:
        return f"{'' if self.sure else '# '}{self.key}: {_yaml(self.value)}"


def guesses(facts: Facts) -> list[Guess]:
    """In the order of the file."""
    partition = _best(facts.partitions)
    kinds = [each for each in facts.partitions if each.name == partition]
    return [
        _partition(facts, partition, kinds),
        *_account(facts),
        *_gpus(facts, kinds),
        _time(partition, kinds),
        *_memory(facts),
        *_containers(facts),
        *_network(facts),
        Guess(
            "offline", True, "Whether compute nodes reach the internet cannot be seen from here. If not: this.", False
        ),
        Guess(
            "purged",
            {next(iter(facts.disks), "/scratch"): 30},
            "Where the site deletes files that are so many days old, its pages say. `submit` then warns of runs there.",
            False,
        ),
    ]


def text(found: Iterable[Guess], header: str) -> str:
    """The file: each guess below its reason."""
    parts = [_comment(header)]
    parts += [f"{_comment(guess.why)}\n{guess.line}" for guess in found]
    return "\n\n".join(parts) + "\n"


def _best(partitions: Iterable[Partition]) -> str:
    """The default partition if it has GPUs, or if none has; else the one with most GPUs."""
    rows = list(partitions)
    default = next((each.name for each in rows if each.is_default), rows[0].name)
    gpus: Counter[str] = Counter()
    for each in rows:
        gpus[each.name] += each.nodes * each.gpus
    return default if gpus[default] or not any(gpus.values()) else max(gpus, key=lambda name: gpus[name])


def _partition(facts: Facts, partition: str, kinds: list[Partition]) -> Guess:
    gpus = sum(each.nodes * each.gpus for each in kinds)
    nodes = cli.plural(sum(each.nodes for each in kinds if each.gpus), "node")
    has = f"{cli.plural(gpus, 'GPU')} on {nodes}" if gpus else "no GPUs that sinfo tells of"
    others = sorted({each.name for each in facts.partitions} - {partition})
    which = "The default partition" if any(each.is_default for each in kinds) else "The partition with most GPUs"
    more = f" The others: {', '.join(others)}." if others else ""
    return Guess("partition", partition, f"{which}, with {has}.{more}")


def _account(facts: Facts) -> Iterator[Guess]:
    if not facts.associations:
        why = "Slurm keeps no accounts here, or does not tell of yours; if sbatch asks for one, name it."
        yield Guess("account", "proj42", why, False)
        return
    names = sorted({each.account for each in facts.associations})
    account = facts.default_account if facts.default_account in names else names[0]
    if len(names) == 1:
        yield Guess("account", account, "The only one that you may submit under.")
    else:
        which = "your default" if account == facts.default_account else "the first"
        yield Guess("account", account, f"You may submit under {', '.join(names)}; this is {which}.")
    qos = sorted({name for each in facts.associations if each.account == account for name in each.qos})
    if len(qos) > 1:
        default = next(
            (each.default_qos for each in facts.associations if each.account == account and each.default_qos), ""
        )
        taken = f"{default} is taken by itself" if default else "Slurm takes one by itself"
        yield Guess("qos", qos[0], f"You may ask for {', '.join(qos)}; {taken}.", False)


def _gpus(facts: Facts, kinds: list[Partition]) -> Iterator[Guess]:
    with_gpus = [each for each in kinds if each.gpus]
    if not with_gpus:
        yield Guess("gpus_per_node", 4, "sinfo tells of no GPUs in this partition.", False)
        return
    counts: Counter[int] = Counter()
    for each in with_gpus:
        counts[each.gpus] += each.nodes
    gpus = counts.most_common(1)[0][0]
    mixed = f" (there are nodes with {', '.join(map(str, sorted(counts)))})" if len(counts) > 1 else ""
    yield Guess("gpus_per_node", gpus, f"What {'most of ' if mixed else ''}its nodes have{mixed}: {with_gpus[0].gres}.")
    features = sorted({name for each in with_gpus for name in each.features.split(",") if name})
    if len(with_gpus) > 1 and features:
        why = f"Its nodes with GPUs are not all alike; they have the features {', '.join(features)}."
        yield Guess("constraint", features[0], why, False)
    select = f"{facts.settings.get('SelectType', '')} {facts.settings.get('SelectTypeParameters', '')}"
    by_node = "cons_tres" in select.lower()
    why = (
        f"SelectType={facts.settings.get('SelectType', '?')} {'knows' if by_node else 'does not know'} --gpus-per-node."
    )
    yield Guess("gpu_directive", "gpus-per-node" if by_node else "gres", why)
    cpus = min(each.cpus for each in with_gpus if each.gpus == gpus)
    if cpus >= gpus:
        yield Guess("cpus_per_task", cpus // gpus, f"A node's {cpus} CPUs, divided by its {gpus} GPUs.")
    else:
        yield Guess("cpus_per_task", 1, f"A node has {cpus} CPUs, fewer than its {gpus} GPUs: ask for fewer.", False)


def _time(partition: str, kinds: list[Partition]) -> Guess:
    limit, default = kinds[0].time_limit, kinds[0].default_time
    why = "A run goes on by itself after its limit, and jobs with a shorter one often begin sooner."
    if default is not None:
        why = f"A job that names no time gets {default}. {why}"
    try:
        longest = minutes(limit)
    except UsageError:  # infinite
        return Guess("time", "24:00:00", f"{partition} has no limit. {why}", sure=default is not None)
    return Guess("time", "24:00:00" if longest > DAY_MIN else limit, f"{partition} allows {limit}. {why}")


def _memory(facts: Facts) -> Iterator[Guess]:
    little = {key: facts.settings.get(key, "UNLIMITED") for key in ("DefMemPerCPU", "DefMemPerNode", "DefMemPerGPU")}
    named = [f"{key}={value}" for key, value in little.items() if value not in ("UNLIMITED", "0")]
    if named:
        why = f"Slurm gives a job {', '.join(named)} MB where it asks for nothing; `mem: 0` is all of a node's."
        yield Guess("sbatch", {"mem": "0"}, why, False)


def _containers(facts: Facts) -> Iterator[Guess]:
    image = "$HOME/gpt2hpc.sqsh" if facts.pyxis and not (facts.programs or facts.modules) else "$HOME/gpt2hpc.sif"
    if facts.programs:
        also = " (srun has pyxis, too)" if facts.pyxis else ""
        yield Guess("runtime", facts.programs[0], f"{facts.programs[0]} is on PATH here{also}.")
    elif facts.modules:
        name = re.match(r"(?i)apptainer|singularity", facts.modules[-1])
        assert name
        yield Guess("runtime", name[0].lower(), f"There is a module for it: {', '.join(facts.modules)}.")
        yield Guess("setup", [f"module load {facts.modules[-1]}"], "Which makes it known to a job.")
    elif facts.pyxis:
        yield Guess("runtime", "pyxis", "srun has an option --container-image.")
    else:
        modules = "and `module avail` names none" if facts.modules is not None else "and there is no `module`"
        yield Guess("runtime", "apptainer", f"No apptainer, singularity or pyxis was found here, {modules}.", False)
    yield Guess(
        "image", image, "An image to run in; without one a job uses the Python that runs `gpt2hpc submit`.", False
    )
    if facts.disks:
        yield Guess("binds", list(facts.disks), "Your large disks, to be seen in a container too.")


def _network(facts: Facts) -> Iterator[Guess]:
    fast = {prefix: [name for name in facts.interfaces if name.startswith(prefix)] for prefix in ("hsn", "ib")}
    prefix = next((each for each, names in fast.items() if names), None)
    if prefix:
        kind = {"hsn": "Slingshot", "ib": "InfiniBand"}[prefix]
        why = f"This machine has {', '.join(fast[prefix])} ({kind}), and compute nodes should have them too: by name, not number."
        yield Guess("environment", {"NCCL_SOCKET_IFNAME": prefix}, why)
        yield Guess("min_allreduce_gb_s", 20, "GB/s of a sound all-reduce; a job that begins with less says so.", False)
    else:
        seen = ", ".join(name for name in facts.interfaces if name != "lo") or "none but lo"
        why = f"No hsn* (Slingshot) or ib* (InfiniBand) among this machine's interfaces: {seen}. If compute nodes have them: this."
        yield Guess("environment", {"NCCL_SOCKET_IFNAME": "ib"}, why, False)
    if facts.suffix:
        yield Guess(
            "master_addr_suffix",
            facts.suffix,
            f"With {facts.suffix!r} after it a node's name is another that resolves.",
        )


def _yaml(value: Any) -> str:
    """As a person would write it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    written = str(value)
    return written if re.fullmatch(r"[\w$/.](?:[\w$/. +-]*[\w$/.+-])?(?::[\w/.]+)*", written) else json.dumps(written)


def _comment(said: str) -> str:
    lines = [line for part in said.split("\n") for line in textwrap.wrap(part, WIDTH, break_long_words=False)]
    return "\n".join(f"# {line}" for line in lines)
