"""The variables that a batch job sets for its ranks: from the site's profile, and by the script itself; each with its why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gpt2hpc.cluster import compile_cache, script
from gpt2hpc.cluster.dist_env import MIN_ALLREDUCE
from gpt2hpc.cluster.site_profile import Site

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

COMPUTED = {
    "MASTER_ADDR": "127.0.0.1 on one node, else the address of the first: where the ranks meet",
    "MASTER_PORT": "from the job's number and restart, and free on that node",
    "OMP_NUM_THREADS": "cpus-per-task, or 1: another number changes the last bits of a CPU run",
    "MALLOC_MMAP_THRESHOLD_": "1073741824, so that memory of the logits is kept between steps",
    "MALLOC_TRIM_THRESHOLD_": "2147483648, for the same",
    "GPT2HPC_JOB_END": "when Slurm will end the job: the ranks save before",
    "GPT2HPC_SRUN": "1: each task of srun is a rank",
    "SLURM_RESTART_COUNT": "as the controller counts",
    "SRUN_CPUS_PER_TASK": "cpus-per-task, which srun does not take over by itself",
}
"""Why the set-up blocks export what they do."""

BY_THE_RANKS = dict.fromkeys(
    compile_cache.FOLDERS, "on the node's own disk, one a user, which later jobs find: a shared one breaks"
)
"""What each rank sets for itself, since it may differ from node to node."""
KEPT = ("OMP_NUM_THREADS", *BY_THE_RANKS)
"""Those that keep the value of the environment that a job is submitted from."""


@dataclass(frozen=True)
class Variable:
    """A variable of the job's environment."""

    name: str
    value: str
    origin: str


def of_site(site: Site) -> list[Variable]:
    """What the profile asks for; a variable that it names itself wins over one that follows from another key."""
    found: dict[str, Variable] = {}
    if site.offline:
        found |= {name: Variable(name, value, "site: offline") for name, value in OFFLINE.items()}
    if site.min_allreduce_gb_s is not None:
        floor = f"{site.min_allreduce_gb_s:g}"
        found[MIN_ALLREDUCE] = Variable(MIN_ALLREDUCE, floor, "site: min_allreduce_gb_s, for the look at the network")
    found |= {name: Variable(name, value, "site: environment") for name, value in site.environment.items()}
    return list(found.values())


def exported(block: str) -> list[str]:
    """Names of the variables that a block of the script exports, in its order."""
    statements = re.findall(r"\bexport ([^;#\n]+)", "\n".join(script.lines(block)))
    words = [word.partition("=")[0] for statement in statements for word in statement.split()]
    return list(dict.fromkeys(word for word in words if re.fullmatch(r"[A-Z]\w*", word)))


def described(block: str, site: Site, env: Mapping[str, str]) -> list[str]:
    """For a dry run: a line for each variable, with its origin; `env` is the environment that the job is submitted from."""
    given = of_site(site)
    lines = [f"{each.name} = {each.value} ({each.origin})" for each in given]
    computed = exported(block)
    for name in [*computed, *(BY_THE_RANKS if "MASTER_ADDR" in computed else ())]:
        if name in KEPT and name in {each.name for each in given}:
            continue
        if name in KEPT and env.get(name):
            lines.append(f"{name} = {env[name]} (your environment)")
        else:
            by = "the ranks" if name in BY_THE_RANKS else "the script"
            lines.append(f"{name}: {(COMPUTED | BY_THE_RANKS).get(name, 'see below')} ({by})")
    return lines
