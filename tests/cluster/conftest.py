"""One Slurm for all tests here, and drives that overlap their waits.

A drive is a function that submits a job, acts on it and waits for its end; `@drives(drive_…)` names the one that a test looks at.
All drives of the selected tests run at once, as far as there are nodes for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cluster import slurm
from tests.cluster.kit import Kit
from tests.cluster.slurm import Cluster

PAIRS = 4


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := slurm.lacking():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no Slurm here: {reason}")
    with slurm.running(tmp_path_factory.mktemp("slurm"), nodes=2 * PAIRS) as running:
        yield running


@pytest.fixture(scope="session")
def kit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    kit = Kit(cluster, tmp_path_factory.mktemp("kit"))
    tiny.make_data(kit.data)
    for number in range(PAIRS):
        kit.pairs.put((f"n{2 * number + 1}", f"n{2 * number + 2}"))
    return kit


@pytest.fixture(scope="session")
def futures(kit: Kit, request: pytest.FixtureRequest) -> Iterator[dict[Callable[[Kit], Any], Future[Any]]]:
    marks = [mark for item in request.session.items for mark in item.iter_markers("drives")]
    wanted = dict.fromkeys(drive for mark in marks for drive in mark.args)
    pool = ThreadPoolExecutor(PAIRS)
    try:
        yield {drive: pool.submit(drive, kit) for drive in wanted}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def driven(request: pytest.FixtureRequest, futures: dict[Callable[[Kit], Any], Future[Any]]) -> Any:
    """What the test's drives returned; one, or a list in the mark's order."""
    mark = request.node.get_closest_marker("drives")
    results = [futures[drive].result() for drive in mark.args]
    return results[0] if len(results) == 1 else results


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[2]
