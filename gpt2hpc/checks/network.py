"""The network between nodes: its interfaces, what NCCL and gloo were told of them, and InfiniBand."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt2hpc.checks.interpreter import Probe
from gpt2hpc.checks.scene import Scene
from gpt2hpc.finding import Finding, missing, ok, warn

NET = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")
SLINGSHOT = Path("/sys/class/cxi")
FAST = ("hsn", "ib")
LAST_PORT = 30_000
"""MASTER_PORT is below it."""


def look(scene: Scene, found: Probe) -> list[Finding]:
    names = interfaces()
    return [
        _interfaces(names, scene),
        *_named(names, scene),
        _own_name(),
        *_fast_name(scene),
        *_ports(),
        *_infiniband(scene, found),
        *_slingshot(scene),
    ]


def interfaces() -> list[str]:
    """Those that are up, but for the loopback and what containers and virtual machines use."""
    found = []
    for path in sorted(NET.glob("*")):
        with contextlib.suppress(OSError):
            state = (path / "operstate").read_text().strip()
            if state in ("up", "unknown") and not path.name.startswith(
                ("lo", "docker", "veth", "virbr", "ifb", "dummy")
            ):
                found.append(path.name)
    return found


def _set(scene: Scene, name: str) -> str | None:
    """As a job would have it: the site's profile, then this environment."""
    return scene.site.environment.get(name) or scene.env.get(name) or None


def _interfaces(names: Sequence[str], scene: Scene) -> Finding:
    if not names:
        return warn("interfaces", "none but the loopback is up: a job of one node works, several cannot meet")
    fast = [name for name in names if name.startswith(FAST)]
    if any(name.startswith("hsn") for name in fast) and not _set(scene, "NCCL_SOCKET_IFNAME"):
        # NCCL looks for names that begin with ib, then takes what comes first.
        text = f"{', '.join(names)}; NCCL may take a slower one than hsn: in a site profile, environment: {{NCCL_SOCKET_IFNAME: hsn}}"
        return warn("interfaces", text)
    return ok("interfaces", f"{', '.join(names)}{'; fast: ' + ', '.join(fast) if fast else ''}")


def matches(wish: str, names: Sequence[str]) -> bool:
    """Whether NCCL_SOCKET_IFNAME leaves an interface: prefixes, `=exact`, `^without`, `^=without` (NCCL's documentation)."""
    without = wish.startswith("^")
    wish = wish.removeprefix("^")
    exact = wish.startswith("=")
    words = [word for word in wish.removeprefix("=").split(",") if word]

    def named(name: str) -> bool:
        return any(name == word if exact else name.startswith(word) for word in words)

    return any(named(name) != without for name in names)


def _named(names: Sequence[str], scene: Scene) -> list[Finding]:
    """What is set must be there: on a node that computes it is else an error at the first step."""
    found = []
    every = [path.name for path in NET.glob("*")]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wish = _set(scene, variable)
        if wish is None:
            continue
        lacking = (
            not matches(wish, every)
            if variable.startswith("NCCL")
            else not all(each in every for each in wish.split(","))
        )
        text = f"{variable}={wish}"
        if not lacking:
            found.append(ok(variable, wish))
        elif scene.is_login_node:
            found.append(
                warn(variable, f"{text}, and this login node has {', '.join(names)}; look at a node that computes")
            )
        else:
            hint = " (gloo wants whole names, not beginnings)" if variable.startswith("GLOO") else ""
            found.append(missing(variable, f"{text} names no interface here{hint}; there are {', '.join(names)}"))
    return found


def _own_name() -> Finding:
    """Debian's installer gives a machine's name the address 127.0.1.1."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        text = f"{name} has no address ({error}); gpt2hpc's jobs find another, for torchrun set MASTER_ADDR"
        return warn("host name", text)
    if address.startswith("127."):
        text = f"{name} is {address}, each node's own; gpt2hpc's jobs avoid it, for torchrun set MASTER_ADDR and GLOO_SOCKET_IFNAME"
        return warn("host name", text)
    return ok("host name", f"{name} is {address}")


def _fast_name(scene: Scene) -> list[Finding]:
    """By which the first node is reached where the site's profile has a suffix for it."""
    suffix = scene.site.master_addr_suffix
    if not suffix or not scene.is_in_job:
        return []
    name = f"{scene.env['SLURMD_NODENAME']}{suffix}"
    try:
        return [ok("master_addr_suffix", f"{name} is {socket.gethostbyname(name)}")]
    except OSError as error:
        text = (
            f"{suffix}: {name} has no address ({error}), so jobs take the slower network; mend it in the site profile"
        )
        return [warn("master_addr_suffix", text)]


def _ports() -> list[Finding]:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return []
    if first < LAST_PORT:
        text = f"the kernel hands out ports from {first} on (ip_local_port_range): the ranks' own may be taken, and the job restarts"
        return [warn("ports", text)]
    return []


def devices(root: Path = INFINIBAND) -> Mapping[str, str]:
    """InfiniBand and RoCE devices, and what their first port is like."""
    found = {}
    for path in sorted(root.glob("*")):
        words = []
        for file in ("state", "rate", "link_layer"):
            with contextlib.suppress(OSError):
                words.append(
                    (path / "ports" / "1" / file).read_text().strip().partition(": ")[2 if file == "state" else 0]
                )
        found[path.name] = ", ".join(words)
    return found


def _infiniband(scene: Scene, found: Probe) -> list[Finding]:
    there = devices()
    if not there:
        return []
    name = "InfiniBand"
    text = "; ".join(f"{device} ({state})" for device, state in there.items())
    if not any("ACTIVE" in state for state in there.values()):
        return [warn(name, f"{text}: no port is active, so NCCL goes by sockets; report it, or exclude this node")]
    if _set(scene, "NCCL_IB_DISABLE") not in (None, "0"):
        return [warn(name, f"{text}, but NCCL_IB_DISABLE is set, so NCCL goes by sockets; unset it")]
    if found.facts is not None and not found.facts.libibverbs:
        where = "the image" if scene.image else "this machine"
        mend = "libibverbs1 and ibverbs-providers (rdma-core)"
        return [
            missing(
                name, f"{text}, but libibverbs is not in {where}: NCCL goes by sockets without a word; install {mend}"
            )
        ]
    return [ok(name, text)]


def _slingshot(scene: Scene) -> list[Finding]:
    if not any(SLINGSHOT.glob("*")) or _set(scene, "NCCL_NET"):
        return []
    text = (
        "NCCL uses it by a plugin (aws-ofi-nccl) alone, and else sockets without a word; in the site profile, "
        'environment: {NCCL_NET: "AWS Libfabric"} makes a missing plugin an error'
    )
    return [warn("Slingshot", text)]
