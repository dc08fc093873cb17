"""Steps over links that the kernel slows: slower by what the bytes of the gradients take, as `gpt2hpc plan` reckons."""

from __future__ import annotations

import os
import subprocess

import pytest

from bench import network, scaling
from bench.network import Link
from bench.scaling import Case

pytestmark = pytest.mark.alone

SLOW, FAST = Link(100), Link(1000)
STEPS = 3


@pytest.fixture(autouse=True)
def _possible() -> None:
    if reason := network.lacking(SLOW):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no emulated network here: {reason}")


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0] for line in listed if str(os.getpid()) in line}


@pytest.mark.timeout(1500)
def test_a_step_gets_slower_as_the_plan_says() -> None:
    alone_s = scaling.measure(Case(2, reduces=False, micro_batch=1), STEPS).step_s
    slow, fast = (Case(2, link=link, micro_batch=1) for link in (SLOW, FAST))
    slow_s, fast_s = (scaling.measure(case, STEPS).step_s for case in (slow, fast))
    assert namespaces() == set()
    gradients = scaling.inputs.traffic_of(scaling.config_of(slow)).parameters * 4
    at_best_s = gradients * 8 / (SLOW.rate_mbit * 1e6)  # 2·(n−1)/n of the bytes, n = 2; a busy machine adds to it
    assert slow_s > 0.95 * at_best_s
    assert slow_s > 1.5 * fast_s
    assert slow_s < 2 * scaling.foretold_s(slow, max(alone_s, fast_s), efficiency=scaling.BUS_EFFICIENCY)


def test_the_network_is_taken_down_whatever_happens() -> None:
    with pytest.raises(ZeroDivisionError):
        _fail_in_it()
    assert namespaces() == set()


def _fail_in_it() -> None:
    with network.emulated(2, SLOW) as nodes:
        assert {node.namespace for node in nodes} < namespaces()
        links = subprocess.run(nodes[0].command(["ip", "-brief", "link"]), capture_output=True, text=True, check=True)
        assert {line.split("@")[0].split()[0] for line in links.stdout.splitlines()} == {"lo", "net0"}
        raise ZeroDivisionError
