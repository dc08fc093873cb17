"""The network interface that leads to another node.

Without GLOO_SOCKET_IFNAME gloo offers the address that the node's own name resolves to, which on Debian is 127.0.1.1: ranks
on other nodes then connect to themselves.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915  # netdevice(7)


def towards(host: str, port: int) -> str | None:
    """Name of the interface whose address this machine would speak to `host` from; None where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        own = str(probe.getsockname()[0])
        if own.startswith("127."):
            return "lo"
        return next((name for _, name in socket.if_nameindex() if _address(probe, name) == own), None)
    return None


def _address(probe: socket.socket, name: str) -> str | None:
    import fcntl

    with contextlib.suppress(OSError):
        found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
    return None
