"""One Slurm for all tests here, and drives that overlap their waits.

A drive is a function that submits a job, acts on it and waits for its end; `@drives(drive_…)` names the one that a test looks at.
All drives of the selected tests run at once, as far as there are nodes for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster.kit import LONG, PAIRS, Kit


@pytest.fixture(scope="session")
def futures(kit: Kit, request: pytest.FixtureRequest) -> Iterator[dict[Callable[[Kit], Any], Future[Any]]]:
    marks = [mark for item in request.session.items for mark in item.iter_markers("drives")]
    wanted = sorted(dict.fromkeys(drive for mark in marks for drive in mark.args), key=lambda drive: drive not in LONG)
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
