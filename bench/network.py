"""Nodes on one machine: network namespaces, joined by a bridge whose links are slowed by the kernel (`tc`).

Everything, the bridge too, is in namespaces of its own, so that nothing of the machine's own network is touched, and goes with them.
The rate of a link is kept in both directions, by tbf; a delay needs netem, which not every kernel has.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SBIN = ":/usr/sbin:/sbin"
"""Where tc is, which is not on everybody's PATH."""
QUEUE_MS = 100
"""Of packets that wait for their turn on a link; more are dropped."""


@dataclass(frozen=True)
class Link:
    """Of each node to the bridge: Mbit/s in each direction, and ms that a packet takes."""

    rate_mbit: float
    delay_ms: float = 0.0

    @property
    def discipline(self) -> list[str]:
        if self.delay_ms:
            return ["netem", "rate", f"{self.rate_mbit}mbit", "delay", f"{self.delay_ms / 2}ms", "limit", "100000"]
        burst = max(
            65536, round(self.rate_mbit * 1e6 / 8 * 1e-3)
        )  # what a millisecond carries, and one large packet at least
        return ["tbf", "rate", f"{self.rate_mbit}mbit", "burst", str(burst), "latency", f"{QUEUE_MS}ms"]


@dataclass(frozen=True)
class Node:
    namespace: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """`words`, to be run there."""
        return ["ip", "netns", "exec", self.namespace, *words]


def lacking(link: Link) -> str | None:
    """Why such a network cannot be made here; None where it can."""
    if os.getuid() != 0:
        return "only root can make network namespaces"
    for program in ("ip", "tc"):
        if shutil.which(program, path=os.environ.get("PATH", "") + SBIN) is None:
            return f"{program} is not installed (iproute2)"
    name = f"gpt2hpc-try-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", *link.discipline)
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` says: {error.stderr.strip()}"
    finally:
        _remove(name)
    return None


@contextlib.contextmanager
def emulated(nodes: int, link: Link) -> Iterator[list[Node]]:
    """So many nodes on one bridge, each with an address and a link of its own; taken down at the end, whatever happens."""
    names = [f"gpt2hpc-{os.getpid()}-{number}" for number in range(nodes)]
    bridge = f"gpt2hpc-{os.getpid()}-bridge"
    made = [Node(name, f"10.213.0.{number + 1}") for number, name in enumerate(names)]
    try:
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for number, node in enumerate(made):
            _join(node, bridge, f"port{number}", link)
        yield made
    finally:
        for name in (*names, bridge):
            _remove(name)


def _join(node: Node, bridge: str, port: str, link: Link) -> None:
    _run("ip", "netns", "add", node.namespace)
    own = ("ip", "-n", node.namespace)
    _run(*own, "link", "set", "lo", "up")
    _run(*own, "link", "add", "net0", "type", "veth", "peer", "name", port, "netns", bridge)
    _run(*own, "addr", "add", f"{node.address}/24", "dev", "net0")
    _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
    _run(*own, "link", "set", "net0", "up")
    for namespace, device in ((node.namespace, "net0"), (bridge, port)):
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *link.discipline)


def _remove(namespace: str) -> None:
    """With what is in it; one that is not there is removed already."""
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
        _run("ip", "netns", "del", namespace)


def _run(*words: str) -> None:
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + SBIN}
    subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
