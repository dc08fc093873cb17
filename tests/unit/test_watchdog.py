"""When silence is a hang, and when not; with real threads, in fractions of seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import Config, RequeueConfig
from gpt2hpc.errors import NodeError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import dumps as watchdog_dumps
from gpt2hpc.training.dumps import Dumps, Silence
from gpt2hpc.training.watchdog import PREFLIGHT, STEP, Limits, Watchdog, collective_timeout, limits

ALONE = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n1")
LEAST_S = 0.6


@pytest.fixture
def dumps(tmp_path: Path) -> Dumps:
    return of_rank(0, tmp_path)


def of_rank(rank: int, folder: Path, *, world_size: int = 1) -> Dumps:
    run = RunDir(folder / "run")
    run.create()
    ledger = Ledger(run)
    attempt = ledger.newest() or ledger.claim(ALONE)
    return Dumps(run, ledger, attempt, rank, [f"n{each}" for each in range(world_size)])


def watched(dumps: Dumps, work: Callable[[Watchdog], None], *, factor: float = 5.0, phase_s: float = 60.0) -> list[int]:
    """What it ended the process with while that was at work; the real end is only written down."""
    ended: list[int] = []
    dog = Watchdog(Limits(LEAST_S, factor, phase_s), dumps, ended.append)
    with dog.watching():
        work(dog)
    return ended


def step(dog: Watchdog, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    dog.beat()


def test_silence_is_a_hang(dumps: Dumps) -> None:
    def work(dog: Watchdog) -> None:
        step(dog)
        time.sleep(8 * LEAST_S)

    ended = watched(dumps, work)
    assert set(ended) == {NodeError.exit_code}
    text = dumps.run.dump(1, 0).read_text()
    assert "Thread 0x" in text
    assert "in work" in text
    (attempt,) = dumps.ledger.attempts()
    assert attempt.suspects == ()


def test_steps_that_take_long_are_none(dumps: Dumps) -> None:
    """Ten times as long as those before, though each is longer than the least limit."""

    def work(dog: Watchdog) -> None:
        step(dog)
        step(dog, LEAST_S / 2)
        step(dog, 5 * LEAST_S)

    assert watched(dumps, work, factor=20) == []
    assert watched(dumps, work, factor=1) != [], "the same without the factor"


def test_the_first_step_and_the_first_of_a_kind_may_take_long(dumps: Dumps) -> None:
    def work(dog: Watchdog) -> None:
        time.sleep(3 * LEAST_S)
        step(dog)
        with dog.phase("val"):
            time.sleep(3 * LEAST_S)
        step(dog)

    assert watched(dumps, work) == []


def test_the_second_of_a_kind_is_measured_by_the_first(dumps: Dumps) -> None:
    def work(dog: Watchdog) -> None:
        for seconds in (0.0, 6 * LEAST_S):
            with dog.phase("val"):
                time.sleep(seconds)

    assert watched(dumps, work) != []


def test_a_save_may_always_take_long(dumps: Dumps) -> None:
    def work(dog: Watchdog) -> None:
        for seconds in (0.0, 4 * LEAST_S):
            with dog.phase("save", more_s=0.0):
                time.sleep(seconds)

    assert watched(dumps, work) == []


def test_a_preflight_may_not(dumps: Dumps) -> None:
    def work(dog: Watchdog) -> None:
        with dog.phase(PREFLIGHT):
            time.sleep(6 * LEAST_S)

    assert watched(dumps, work) != []


def test_one_that_goes_on_withdraws(tmp_path: Path) -> None:
    """While the others' dumps are waited for: a disk that answers after all."""
    dumps = of_rank(0, tmp_path, world_size=2)

    def work(dog: Watchdog) -> None:
        step(dog)
        while not dumps.run.dump(1, 0).exists():
            time.sleep(0.01)
        deadline = time.monotonic() + 10  # before the others are given up
        while dumps.run.dumps_of(1).exists():
            assert time.monotonic() < deadline, "its dump is still there"
            step(dog, 0.05)

    assert watched(dumps, work) == []


def test_a_silent_rank_joins_in(tmp_path: Path) -> None:
    """Its own limit is far away; a peer's is over."""
    other = of_rank(1, tmp_path, world_size=2)
    dumps = of_rank(0, tmp_path, world_size=2)

    def work(dog: Watchdog) -> None:
        other.write(Silence("step", 1.0, 1.0, 7))
        time.sleep(6 * LEAST_S)  # the first step: 60 s are allowed

    assert watched(dumps, work) != []
    assert "stacks of 2 ranks" in (dumps.run.dumps_of(1) / "told.txt").read_text()


def test_a_rank_without_a_dump_is_suspected(tmp_path: Path) -> None:
    dumps = of_rank(0, tmp_path, world_size=3)
    of_rank(1, tmp_path, world_size=3).write(Silence("step", 1.0, 1.0, 7))

    def work(dog: Watchdog) -> None:
        step(dog)
        time.sleep(8 * LEAST_S)

    assert watched(dumps, work) != []
    (attempt,) = dumps.ledger.attempts()
    assert (attempt.suspects, attempt.exit_code) == (("n2",), NodeError.exit_code)


def test_many_nodes_without_a_dump_are_not_to_blame(tmp_path: Path) -> None:
    dumps = of_rank(0, tmp_path, world_size=9)
    for rank in range(7):
        of_rank(rank, tmp_path, world_size=9).write(Silence("step", 1.0, 1.0, 7))
    assert dumps.conclude(lambda: False, 0.0)
    assert dumps.ledger.attempts()[0].suspects == ("n7", "n8")
    more = of_rank(0, tmp_path / "more", world_size=9)
    for rank in range(6):
        of_rank(rank, tmp_path / "more", world_size=9).write(Silence("step", 1.0, 1.0, 7))
    assert more.conclude(lambda: False, 0.0)
    assert more.ledger.attempts()[0].suspects == ()
    assert "; 3 of 9 nodes are too many to blame" in (more.run.dumps_of(1) / "told.txt").read_text()


def test_the_first_step_teaches_how_long_steps_take(dumps: Dumps) -> None:
    def work(dog: Watchdog) -> None:
        with dog.phase("first step", more_s=0.0, teaches=STEP):
            step(dog, 2 * LEAST_S)
            step(dog)
        step(dog)
        step(dog, 4 * LEAST_S)

    assert watched(dumps, work, factor=20) == []


def test_what_is_waited_for_is_progress_and_teaches_nothing(dumps: Dumps) -> None:
    def work(dog: Watchdog) -> None:
        for _ in range(6):
            time.sleep(LEAST_S / 2)
            dog.stir()
        step(dog)
        time.sleep(6 * LEAST_S)

    def waits(dog: Watchdog) -> None:
        step(dog)
        for _ in range(6):
            time.sleep(LEAST_S / 2)
            dog.stir()

    assert watched(dumps, waits, factor=2) == []
    assert watched(dumps, work, factor=2) != []


@pytest.mark.parametrize("error", [IndexError("no rank"), ValueError("a closed file"), OSError("no space")])
@pytest.mark.parametrize("where", ["write", "conclude"])
def test_it_ends_whatever_goes_wrong(
    dumps: Dumps, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception, where: str
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Dumps, where, fail)

    def work(dog: Watchdog) -> None:
        step(dog)
        time.sleep(4 * LEAST_S)

    assert watched(dumps, work) != []
    assert f"gpt2hpc: warning: the stacks of a hung attempt could not be written: {error!r}" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["are_begun", "write", "conclude"])
def test_it_ends_though_a_disk_never_answers(dumps: Dumps, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(Dumps, where, lambda *arguments: threading.Event().wait())

    def work(dog: Watchdog) -> None:
        step(dog)
        time.sleep(12 * LEAST_S)

    assert watched(dumps, work) != []


def test_one_that_goes_on_while_it_is_told_withdraws(dumps: Dumps, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a terminal was held up, the message too."""
    begun, held = threading.Event(), threading.Event()

    def write(text: str) -> None:
        begun.set()
        assert held.wait(20)

    monkeypatch.setattr(watchdog_dumps, "complain", write)

    def work(dog: Watchdog) -> None:
        step(dog)
        assert begun.wait(20)
        step(dog)
        held.set()
        deadline = time.monotonic() + 20
        while dumps.run.dumps_of(1).exists():
            assert time.monotonic() < deadline, "its dump is still there"
            step(dog, 0.05)

    assert watched(dumps, work) == []
    assert dumps.ledger.attempts()[0].exit_code is None


def test_a_save_that_is_under_way_is_waited_for(dumps: Dumps) -> None:
    """Until it is done; or, if it never is, for a while."""
    ended: list[int] = []
    saving = threading.Event()
    saving.set()
    dog = Watchdog(Limits(LEAST_S, 5.0, 60.0), dumps, ended.append)
    dog.spares(saving.is_set)
    with dog.watching():
        step(dog)
        until(lambda: (dumps.run.dumps_of(1) / "told.txt").exists())
        time.sleep(LEAST_S)
        assert ended == []
        saving.clear()
        until(lambda: ended != [])
        saving.set()
        del ended[:]
        until(lambda: ended != [])


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_settings() -> None:
    wish = RequeueConfig(hang_minutes=2.0, hang_factor=3.0, hang_phase_minutes=1.0)
    assert limits(Config(requeue=wish), waits_for_shards=False) == Limits(120.0, 3.0, 120.0)
    patient = limits(Config(requeue=wish), waits_for_shards=True)
    assert patient is not None
    assert patient.least_s == Config().data.patience_s + 60
    assert limits(Config(requeue=RequeueConfig(hang_minutes=None)), waits_for_shards=True) is None


@pytest.mark.parametrize(
    "wish", [RequeueConfig(), RequeueConfig(hang_minutes=90.0), RequeueConfig(hang_phase_minutes=600.0)]
)
def test_collectives_wait_longer_than_any_limit(wish: RequeueConfig) -> None:
    found = limits(Config(requeue=wish), waits_for_shards=True)
    assert found is not None
    assert collective_timeout(Config(requeue=wish)).total_seconds() > found.phase_s + 300


def test_collectives_wait_where_nobody_watches() -> None:
    assert collective_timeout(Config(requeue=RequeueConfig(hang_minutes=None))).total_seconds() >= 86400


def test_switched_off_it_watches_nothing(dumps: Dumps) -> None:
    ended: list[int] = []
    dog = Watchdog(None, dumps, ended.append)
    with dog.watching(), dog.phase("val"):
        dog.beat()
    assert ended == []
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
