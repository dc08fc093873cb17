"""One round of chaos.py; `make chaos` runs longer ones, with any seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.cluster import chaos
from tests.cluster.chaos import KINDS, Tortured, plan, really_struck, torture, undisturbed, unharmed
from tests.cluster.kit import Ended, Kit, drives, long

pytestmark = pytest.mark.timeout(1500)
SEED = 7


@long
def drive_chaos(kit: Kit) -> Tortured:
    return torture(kit, plan(SEED))


def drive_undisturbed(kit: Kit) -> Ended:
    return undisturbed(kit, plan(SEED))


@drives(drive_chaos, drive_undisturbed)
def test_ten_faults_leave_the_bytes_of_an_undisturbed_run(driven: tuple[Tortured, Ended]) -> None:
    tortured, other = driven
    assert tortured.plan.steps >= 200
    assert tortured.faults.total() >= 10
    assert tortured.slurm["NumNodes"] == "2"
    really_struck(tortured)
    unharmed(tortured, other)


@drives(drive_chaos, drive_undisturbed)
def test_one_bit_would_have_been_seen(driven: tuple[Tortured, Ended], tmp_path: Path) -> None:
    tortured, other = driven
    run = tiny.copy_run(tortured.job.run, tmp_path / "run")
    changed = replace(tortured, job=replace(tortured.job, run=run))
    unharmed(changed, other)
    path = tiny.newest(run).path / "state-00003-of-00004.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(AssertionError, match="other bytes than undisturbed"):
        unharmed(changed, other)


@drives(drive_chaos)
def test_a_fault_that_did_nothing_would_have_been_seen(driven: Tortured) -> None:
    """Each strike in turn is said to have hit the attempt that nothing hit, the last one."""
    for number, struck in enumerate(driven.struck):
        missed = [*driven.struck]
        missed[number] = replace(struck, attempt=len(driven.job.attempts))
        with pytest.raises(AssertionError, match=f"{struck.strike.kind}.* ended as finished"):
            really_struck(replace(driven, struck=missed))


@pytest.mark.parametrize("strikes", [len(KINDS), 8, 40])
def test_a_plan_holds_every_kind_and_is_the_seeds(strikes: int) -> None:
    plans = [plan(seed, strikes=strikes) for seed in range(50)]
    assert plans == [plan(seed, strikes=strikes) for seed in range(50)]
    assert len(set(map(str, plans))) == 50
    for each in plans:
        steps = [strike.step for strike in each.strikes]
        assert {strike.kind for strike in each.strikes} == set(KINDS)
        assert steps == sorted(set(steps))
        assert steps[0] > 2 * chaos.SAVE_EVERY  # a damaged checkpoint has a predecessor
        assert steps[-1] < each.steps - chaos.LAST_STEPS
        assert each.faults == strikes + strikes // 4
