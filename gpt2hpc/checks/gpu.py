"""GPUs and their driver, as nvidia-smi tells, against what torch was built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt2hpc.checks.interpreter import Facts, Probe, build
from gpt2hpc.checks.programs import ask
from gpt2hpc.checks.scene import Scene
from gpt2hpc.finding import Finding, missing, ok, warn

Card = Mapping[str, str]

LEAST_DRIVERS = {13: 580, 12: 525, 11: 450}
"""By CUDA's major version, which newer drivers serve too; https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html,
table 1."""
BASIC = ("index", "name", "driver_version", "memory.total", "memory.used", "compute_mode")
MORE = ("ecc.mode.current", "ecc.errors.uncorrected.volatile.total", "mig.mode.current", "persistence_mode")
"""Older versions of nvidia-smi refuse a question whole that names one that they do not know."""
IN_USE_MIB = 1024


def look(scene: Scene, found: Probe) -> list[Finding]:
    cards = _cards()
    if not cards:
        return [_none(scene, found.facts)]
    findings = [_count(cards, scene), *_state(cards)]
    if found.facts is not None and found.facts.torch is not None:
        findings += [*_driver(cards, found.facts), *_built_for(found.facts)]
    if "SLURM_GPUS_PER_TASK" in scene.env:
        text = "this job has --gpus-per-task, which hides GPUs from each other, so NCCL loses NVLink; ask with --gpus-per-node"
        findings.append(warn("gpus-per-task", text))
    return findings


def parsed(said: str, columns: Sequence[str]) -> list[Card]:
    """The rows of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; those with another number of columns are no cards."""
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]


def _cards() -> list[Card]:
    for columns in ((*BASIC, *MORE), BASIC):
        answer = ask(("nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"))
        if answer is not None and answer.code == 0 and (cards := parsed(answer.out, columns)):
            return cards
    return []


def _none(scene: Scene, facts: Facts | None) -> Finding:
    """No GPU, or none that nvidia-smi tells of: is one due?"""
    if facts is not None and facts.gpus:
        return ok("GPUs", f"torch sees {facts.gpus} ({build(facts)}), though there is no nvidia-smi to tell more")
    answer = ask(("nvidia-smi", "-L"))
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/version").exists():
        said = "nvidia-smi is not on PATH" if answer is None else f"nvidia-smi says: {answer.words}"
        return missing(
            "GPUs", f"there is an NVIDIA driver, but {said}; is a GPU broken, or --nv missing in a container?"
        )
    if scene.gpus_allotted or scene.wants_gpu:
        why = "this job has GPUs" if scene.gpus_allotted else "one is wished for (--gpu)"
        sees = f"; torch {facts.torch} ({build(facts)}) sees none either" if facts and facts.torch else ""
        mend = "is its driver loaded? Ask for --gpus-per-node, or train with --device cpu"
        return missing("GPUs", f"{why}, but nvidia-smi tells of none here{sees}; {mend}")
    if Path("/dev/kfd").exists():
        return warn(
            "GPUs", "AMD's, it seems; gpt2hpc was made for NVIDIA's, and was not tried with a ROCm build of torch"
        )
    hint = (
        "; look at a node that computes: `srun --gpus-per-node=1 gpt2hpc doctor --gpu`" if scene.is_login_node else ""
    )
    return ok("GPUs", f"none on this machine{hint}")


def _count(cards: Sequence[Card], scene: Scene) -> Finding:
    kinds = sorted({f"{card['name']} ({_gib(card['memory.total'])})" for card in cards})
    text = f"{len(cards)} × {', '.join(kinds)}, driver {cards[0]['driver_version']}"
    wanted = scene.gpus_per_node
    if scene.is_in_job and wanted and len(cards) < wanted:
        return warn("GPUs", f"{text}; the site's profile says gpus_per_node={wanted}, so ask for as many")
    if len(kinds) > 1:
        return warn("GPUs", f"{text}; ranks go at the pace of the slowest, so ask for one kind with --constraint")
    return ok("GPUs", text)


def _gib(mib: str) -> str:
    return f"{int(mib) / 1024:.0f} GiB" if mib.isdecimal() else mib


def _state(cards: Sequence[Card]) -> list[Finding]:
    """What a card says of itself that a training would feel."""
    found = []
    for card in cards:
        name = f"GPU {card['index']}"
        if card["compute_mode"] == "Prohibited":
            found.append(
                missing(name, "its compute mode is Prohibited; have it set to Default (nvidia-smi -c 0, as root)")
            )
        if card.get("mig.mode.current") == "Enabled":
            found.append(
                warn(name, "is split by MIG, across whose parts NCCL does not work: one rank, or have it switched off")
            )
        errors = card.get("ecc.errors.uncorrected.volatile.total", "0")
        if errors.isdecimal() and int(errors):
            found.append(
                warn(name, f"{errors} uncorrected memory errors since its start; exclude this node, and report it")
            )
        if card.get("ecc.mode.current") == "Disabled":
            found.append(
                warn(name, "ECC is off: flipped bits go unseen; have it switched on (nvidia-smi -e 1, as root)")
            )
        used = card["memory.used"]
        if used.isdecimal() and int(used) > IN_USE_MIB:
            found.append(warn(name, f"{_gib(used)} of its memory are in use already; see `nvidia-smi`, or use another"))
    if any(card.get("persistence_mode") == "Disabled" for card in cards):
        found.append(ok("persistence mode", "off: each start waits some seconds for the driver"))
    return found


def least_driver(cuda: str) -> int | None:
    """Of the driver's branch, for a torch built for that CUDA."""
    return LEAST_DRIVERS.get(int(cuda.partition(".")[0]))


def _driver(cards: Sequence[Card], facts: Facts) -> list[Finding]:
    """Does torch see the cards, and if not, why?"""
    driver = cards[0]["driver_version"]
    if facts.hip:
        return [missing("CUDA", f"torch {facts.torch} is built for ROCm, and these are NVIDIA's; install a CUDA build")]
    if facts.cuda is None:
        newest = _newest_cuda(driver)
        fitting = f"for CUDA {newest}" if newest else "for a driver this old"
        text = f"torch {facts.torch} is a CPU build on a machine with GPUs; install one {fitting} (pytorch.org, Get started)"
        return [missing("CUDA", text)]
    least = least_driver(facts.cuda)
    is_old = least is not None and _branch(driver) < least
    if facts.gpus:
        if is_old:
            text = f"driver {driver} is below {least}, which CUDA {facts.cuda} wants, but torch sees the GPUs (cuda-compat?)"
            return [warn("CUDA", text)]
        nccl = f", NCCL {facts.nccl_version}" if facts.nccl_version else ""
        found = [ok("CUDA", f"{facts.cuda} with driver {driver} (at least {least}), torch sees {facts.gpus}{nccl}")]
        return found if facts.nccl else [*found, missing("NCCL", "torch has none, by which GPUs exchange gradients")]
    if is_old:
        newest = _newest_cuda(driver)
        mend = f"install a torch for CUDA {newest}, or a newer driver" if newest else "install a newer driver"
        return [
            missing(
                "CUDA", f"driver {driver} is too old for torch {facts.torch} (CUDA {facts.cuda} needs {least}); {mend}"
            )
        ]
    text = f"torch {facts.torch} sees no GPU, though driver {driver} would do; is CUDA_VISIBLE_DEVICES empty, or --nv missing?"
    return [missing("CUDA", text)]


def _newest_cuda(driver: str) -> int | None:
    """The major version that this driver serves."""
    return next((major for major, least in LEAST_DRIVERS.items() if _branch(driver) >= least), None)


def _branch(driver: str) -> int:
    number = driver.partition(".")[0]
    return int(number) if number.isdecimal() else 0


def _built_for(facts: Facts) -> list[Finding]:
    """Machine code for these cards in this torch?"""
    old = [f"{a}.{b}" for a, b in facts.capabilities if not runs((a, b), facts.architectures)]
    if not facts.architectures or not old:
        return []
    text = (
        f"torch {facts.torch} holds no code for compute capability {', '.join(old)} (it has {' '.join(facts.architectures)}); "
        "install a build for an older CUDA"
    )
    return [missing("GPU code", text)]


def runs(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether there is `sm_XY` with the same X and no larger Y, or `compute_XY` that is no larger (CUDA C++ Programming Guide, 3.1)."""
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(filter(str.isdecimal, number))
        if not digits:
            continue
        major, minor = divmod(int(digits), 10)
        if kind == "compute" and (major, minor) <= capability:
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False
