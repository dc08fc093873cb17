"""Which interface gloo is given."""

from __future__ import annotations

import socket
import sys

import pytest

from gpt2hpc.cluster.interface import towards

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")


def test_this_machine_is_reached_by_loopback() -> None:
    assert towards("127.0.0.1", 12345) == towards("localhost", 12345) == "lo"


def test_a_name_that_does_not_resolve_tells_nothing() -> None:
    assert towards("no-such-node.invalid", 12345) is None


def test_an_address_elsewhere_is_reached_by_an_interface_that_has_one() -> None:
    """192.0.2.1 is for documentation (RFC 5737): there is a route to it wherever there is a default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 12345))
        except OSError:
            assert towards("192.0.2.1", 12345) is None  # no network but this machine
            return
        own = probe.getsockname()[0]
    name = towards("192.0.2.1", 12345)
    assert name in [each for _, each in socket.if_nameindex()]
    assert towards(own, 12345) in (name, "lo")
