"""What a job would ask of Slurm, by the site's profile and the flags: would it be taken, and what does a preemption cost it?"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Mapping, Sequence

from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import inventory, slurm
from gpt2hpc.errors import UsageError
from gpt2hpc.finding import Finding, missing, ok, warn

Partitions = Mapping[str, Mapping[str, str]]


def look(scene: Scene) -> list[Finding]:
    """Empty where Slurm does not answer, which is said elsewhere."""
    partitions = inventory.partition_settings()
    if not partitions:
        return []
    settings = inventory.settings()
    wanted = scene.asked.get("partition")
    names = str(wanted).split(",") if wanted else [_here(scene, partitions)]
    found = []
    for name in filter(None, names):
        found += [_partition(name, partitions)]
        if name in partitions:
            found += [_limit(name, partitions[name], scene), preemption(name, partitions, settings, scene)]
            found += _nodes(name, scene)
    if not wanted and (graceless := _graceless(partitions, settings, but=names)):
        text = f"a job that is preempted in {', '.join(graceless)} has no grace, and may lose the steps since its last save"
        found.append(warn("other partitions", f"{text}; look with --partition NAME"))
    return [*found, *_account(scene), *([] if scene.is_in_job else [_trial(scene)])]


def _graceless(partitions: Partitions, settings: Mapping[str, str], *, but: Sequence[str | None]) -> list[str]:
    """The other partitions whose jobs are preempted without grace."""
    return [name for name in partitions if name not in but and _grace_s(name, partitions, settings) == 0]


def _here(scene: Scene, partitions: Partitions) -> str | None:
    """The partition of the job that this is, or the one that a job goes to that names none."""
    default = next((name for name, each in partitions.items() if each.get("Default") == "YES"), None)
    return scene.env.get("SLURM_JOB_PARTITION", default)


def _partition(name: str, partitions: Partitions) -> Finding:
    if name not in partitions:
        near = difflib.get_close_matches(name, partitions, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return missing("partition", f"{name} does not exist; {hint}there are {', '.join(list(partitions)[:20])}")
    facts = partitions[name]
    state = facts.get("State", "UP")
    if state != "UP":
        return missing("partition", f"{name} is {state}: a job would wait there; choose another with --partition")
    return ok("partition", f"{name}, {facts.get('TotalNodes', '?')} nodes")


def _limit(name: str, facts: Mapping[str, str], scene: Scene) -> Finding:
    """The time limit of each attempt."""
    longest, given = facts.get("MaxTime", "UNLIMITED"), scene.asked.get("time")
    longest_s = slurm.seconds(longest)
    if given is None:
        default = facts.get("DefaultTime", "NONE")
        limit = longest if default == "NONE" else default
        return ok(
            "time limit", f"{limit} unless --time says otherwise, {longest} at most; a job saves before, and goes on"
        )
    try:
        given_s = 60 * slurm.minutes(str(given))
    except UsageError:
        return missing("time limit", f"time={given} is not a time; write minutes, HH:MM:SS or DAYS-HH:MM:SS")
    if longest_s is not None and given_s > longest_s:
        text = f"time={given} is above MaxTime={longest} of partition {name}: such a job never starts; lower it"
        return missing("time limit", text)
    return ok("time limit", f"{given}, {longest} at most; a job saves before, and goes on")


def _nodes(name: str, scene: Scene) -> list[Finding]:
    """GPUs and features of its nodes against those asked for: Slurm's own refusal would not say which."""
    found = []
    kinds = [each for each in inventory.partitions() or [] if each.name == name]
    most, wanted = max((each.gpus for each in kinds), default=0), scene.gpus_per_node
    if wanted and wanted > most:
        found.append(
            missing("GPUs of nodes", f"{wanted} a node are asked for, and nodes of {name} have {most} at most")
        )
    elif wanted:
        found.append(ok("GPUs of nodes", f"{wanted} of {most} a node"))
    features = {word for each in kinds for word in re.split(r"[,()|&]", each.features) if word}
    words = re.findall(r"[^\W\d][\w.-]*", str(scene.asked.get("constraint", "")))
    if lacking := [word for word in words if word not in features]:
        there = f"have {', '.join(sorted(features))}" if features else "have no features"
        found.append(missing("constraint", f"{', '.join(lacking)} is no feature of a node of {name}; they {there}"))
    return found


def preemption(name: str, partitions: Partitions, settings: Mapping[str, str], scene: Scene) -> Finding:
    """What a preemption costs a job in that partition."""
    kind = settings.get("PreemptType", "preempt/none").removeprefix("preempt/")
    if kind == "qos":
        return _by_qos(scene, settings)
    grace_s = _grace_s(name, partitions, settings)
    if grace_s is None:
        return ok("preemption", f"none in {name}")
    mode = partitions[name].get("PreemptMode", "")
    return _cost(f"{name} (PreemptMode={mode})", mode, grace_s, settings, scene)


def _cost(what: str, mode: str, grace_s: int, settings: Mapping[str, str], scene: Scene) -> Finding:
    if "SUSPEND" in mode or "GANG" in mode:
        text = f"{what}: a job is frozen, not ended; ranks on several nodes may give each other up when they thaw, and restart"
        return warn("preemption", text)
    every = scene.config.checkpoint.every_minutes
    mend = f"steps since the last save are lost (checkpoint.every_minutes={every:g}): save more often, as --checkpoint.every_minutes 5"
    if grace_s == 0:
        wait_s = slurm.seconds(settings.get("KillWait", "")) or 0
        text = f"{what}: GraceTime=0 leaves KillWait={wait_s} s at most, and {scene.save_words}; else the {mend}"
        return warn("preemption", text)
    if grace_s < 1.5 * scene.save_s:
        return warn(
            "preemption", f"{what}: GraceTime={grace_s} s, and {scene.save_words}; what does not fit: the {mend}"
        )
    return ok("preemption", f"{what}: GraceTime={grace_s} s to save in; {scene.save_words}; then it waits and goes on")


def _by_qos(scene: Scene, settings: Mapping[str, str]) -> Finding:
    """Where the quality of service decides."""
    named = scene.asked.get("qos") or scene.env.get("SLURM_JOB_QOS")
    facts = inventory.qualities().get(str(named or "normal"))
    if facts is None:
        text = f"by QOS, and Slurm does not tell what {named or 'the default one'} allows; ask with `sacctmgr show qos`"
        return warn("preemption", text)
    mode = facts["PreemptMode"].upper()
    mode = settings.get("PreemptMode", "") if mode in ("", "CLUSTER") else mode
    if mode == "OFF":
        return ok("preemption", f"none under QOS {facts['Name']}")
    return _cost(
        f"QOS {facts['Name']} (PreemptMode={mode})", mode, slurm.seconds(facts["GraceTime"]) or 0, settings, scene
    )


def _grace_s(name: str, partitions: Partitions, settings: Mapping[str, str]) -> int | None:
    """Seconds that a job there has when one of a higher tier takes its nodes; None where none can."""
    own = partitions[name]
    if settings.get("PreemptType") != "preempt/partition_prio" or own.get("PreemptMode", "OFF") == "OFF":
        return None
    nodes, tier = set(slurm.expand_nodes(own.get("Nodes", ""))), int(own.get("PriorityTier", 0))
    for each in partitions.values():
        if int(each.get("PriorityTier", 0)) > tier and nodes & set(slurm.expand_nodes(each.get("Nodes", ""))):
            return slurm.seconds(own.get("GraceTime", "0"))
    return None


def _account(scene: Scene) -> list[Finding]:
    """Account and QOS, as far as Slurm keeps any."""
    found = []
    for name in ("account", "qos"):
        value = scene.asked.get(name)
        if value is None:
            continue
        there = _accounts(scene) if name == "account" else set(inventory.qualities())
        if not there:
            found.append(ok(name, f"{value}; Slurm has no list of them here"))
        elif value in there:
            found.append(ok(name, str(value)))
        else:
            found.append(missing(name, f"{value} is none of yours; there are {', '.join(sorted(there)[:20])}"))
    return found


def _accounts(scene: Scene) -> set[str]:
    return {each.account for each in inventory.associations(scene.env.get("USER", "")) or ()}


def _trial(scene: Scene) -> Finding:
    """Slurm's own word: `sbatch --test-only` with all that would be asked for, which submits nothing."""
    options = {"nodes": scene.nodes, **{name: value for name, value in scene.asked.items() if value is not None}}
    words = " ".join(f"--{name}={value}" for name, value in options.items())
    if "time" in options:
        with contextlib.suppress(UsageError):  # what is no time, Slurm refuses itself
            options["time"] = slurm.minutes(str(options["time"]))  # as jobs ask: it takes no part of a minute
    refusal = inventory.refusal(options)
    if refusal is None:
        return ok("sbatch", f"would take a job with {words}")
    if re.search(r"not available now|try again|[Tt]ime.?out|[Ss]ocket", refusal):
        return warn("sbatch", f"would not take a job with {words} at present: {refusal}")
    text = f"refuses a job with {words}: {refusal}; change the site's profile, or these flags"
    return missing("sbatch", text)
