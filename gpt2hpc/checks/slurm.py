"""Slurm: does it answer, and which of its settings decide what a preemption, a cancellation or a long array costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import inventory, slurm
from gpt2hpc.finding import Finding, missing, ok, warn

Settings = Mapping[str, str]


def look(scene: Scene) -> list[Finding]:
    """Of Slurm as a whole; what a job would ask of it is in `asked`."""
    settings, found = answered(scene)
    if not settings:
        return found
    return [
        *found,
        _kill_wait(settings, scene),
        *_preemption_signal(settings),
        _requeue(settings),
        _proctrack(settings, scene),
        _arrays(settings),
        _accounts(settings),
    ]


def answered(scene: Scene) -> tuple[Settings, list[Finding]]:
    """Slurm's settings, or none, and what is to be said of that."""
    if not scene.has_slurm:
        if scene.is_in_image:
            return {}, [ok("slurm", "not asked: in a container image it is the host's; run `gpt2hpc doctor` there too")]
        text = "sbatch is not on PATH, so `gpt2hpc submit` trains here; on a cluster use a login node, or `module load slurm`"
        return {}, [warn("slurm", text)]
    conf = scene.env.get("SLURM_CONF")
    if conf and not Path(conf).is_file():  # Slurm's programs would wait a minute for it
        return {}, [missing("slurm", f"SLURM_CONF={conf} is not a file; unset it, or name the cluster's slurm.conf")]
    settings, reason = inventory.settings_or_silence()
    if reason is not None:
        text = f"it is installed, but does not answer; is this a login node, the controller up? --cluster local does without ({reason})"
        return {}, [missing("slurm", text)]
    return settings, [ok("slurm", f"{settings.get('SLURM_VERSION', '?')}, cluster {settings.get('ClusterName', '?')}")]


def _kill_wait(settings: Settings, scene: Scene) -> Finding:
    wait_s = slurm.seconds(settings.get("KillWait", ""))
    if wait_s is None:
        return warn(
            "KillWait", "not known: the seconds from SIGTERM to SIGKILL, in which a cancelled job may still save"
        )
    if wait_s < scene.save_s:
        text = f"{wait_s} s from SIGTERM to SIGKILL, and {scene.save_words}; before `scancel`, `touch RUN_DIR/STOP` and wait"
        return warn("KillWait", text)
    return ok("KillWait", f"{wait_s} s from SIGTERM to SIGKILL; {scene.save_words}")


def _preemption_signal(settings: Settings) -> list[Finding]:
    """SIGTERM comes at a preemption whatever this says; gpt2hpc takes it, other programs wait for the one of --signal alone."""
    if settings.get("PreemptType", "preempt/none") == "preempt/none":
        return []
    given = f"{settings.get('SlurmctldParameters', '')},{settings.get('PreemptParameters', '')}"
    sent = "is sent" if "send_user_signal" in given else "is not sent"
    return [
        ok("preempt_send_user_signal", f"a script's own --signal {sent} at a preemption; SIGTERM is, which is enough")
    ]


def _requeue(settings: Settings) -> Finding:
    if settings.get("JobRequeue") == "0":
        text = "0: a job is requeued only if it asks for that; gpt2hpc's do, in a script of your own write `#SBATCH --requeue`"
        return warn("JobRequeue", text)
    return ok("JobRequeue", "1: jobs come back after a preemption or a lost node")


def _proctrack(settings: Settings, scene: Scene) -> Finding:
    kind = settings.get("ProctrackType", "").removeprefix("proctrack/")
    if kind == "cgroup":
        return ok("ProctrackType", "cgroup: a signal reaches the first process of a task, which saves")
    effect = (
        f"{kind or 'not known'}: a signal may reach every process of a task, also the one that serves an image's files"
    )
    if scene.image is None:
        return ok("ProctrackType", f"{effect}; no image is used")
    if scene.uses_pyxis:
        return ok("ProctrackType", f"{effect}; pyxis unpacks the image, so none does")
    if scene.site.runtime == "docker":
        return ok("ProctrackType", f"{effect}; docker's daemon serves the image's files, so none does")
    if Path(scene.image).is_dir():
        return ok("ProctrackType", f"{effect}; the image is a directory, so none does")
    return ok(
        "ProctrackType", f"{effect}: unless root mounts it, each job has it unpacked on its nodes, in /tmp, first"
    )


def _arrays(settings: Settings) -> Finding:
    size = settings.get("MaxArraySize", "")
    if size in ("0", "1"):
        return warn("MaxArraySize", f"{size}: no job arrays here, so `gpt2hpc submit prepare` has one task at a time")
    return ok("MaxArraySize", f"{size}: `gpt2hpc submit prepare` makes several arrays of more tasks than that")


def _accounts(settings: Settings) -> Finding:
    if settings.get("AccountingStorageType", "").endswith("/none"):
        forgotten = settings.get("MinJobAge", "")
        text = f"none are kept: {forgotten} after its end Slurm forgets a job, and `gpt2hpc status` has the run directory alone"
        return warn("sacct", text)
    return ok("sacct", "accounts are kept")


def of_image(scene: Scene) -> list[Finding]:
    """What matters to an image of all that `look` finds; empty without a Slurm."""
    if not scene.has_slurm:
        return []
    settings, _ = answered(scene)
    if not settings:
        return [warn("ProctrackType", "not known, for Slurm does not answer: gpt2hpc doctor says why")]
    return [_proctrack(settings, scene)]
