"""A rank that is stuck ends its attempt, with the stacks of all that can show theirs; one that is slow does not."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.cluster.signals import SignalFlag
from gpt2hpc.config import Config
from gpt2hpc.data import verify
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.errors import NodeError
from gpt2hpc.evaluation import hellaswag
from gpt2hpc.jobs import Train
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import resume
from gpt2hpc.training.learner import Learner
from gpt2hpc.training.trainer import Trainer
from gpt2hpc.training.watchdog import Watchdog, collective_timeout
from tests import questions, tiny

pytestmark = pytest.mark.alone

RANKS = 4
HANG_S = 5.0
PHASE_MINUTES = 55.0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture(scope="module")
def settings(shared_data: Manifest) -> Config:
    return impatient(tiny.config(shared_data.where), HANG_S)


@pytest.fixture(scope="module")
def undisturbed(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("undisturbed") / "run")
    assert tiny.run_ranks(run, settings, nproc=RANKS) == 0
    return run


def impatient(settings: Config, seconds: float) -> Config:
    return dataclasses.replace(settings, requeue=dataclasses.replace(settings.requeue, hang_minutes=seconds / 60))


def dumps(run: RunDir, attempt: int = 1) -> dict[int, str]:
    """The dumps of an attempt, by rank."""
    found = {rank: run.dump(attempt, rank) for rank in range(RANKS)}
    return {rank: path.read_text() for rank, path in found.items() if path.exists()}


def supervised(run: RunDir, settings: Config, *options: str, nproc: int = RANKS) -> subprocess.CompletedProcess[str]:
    """`gpt2hpc submit`, each rank of which is rank.py with these options."""
    program = (
        "import sys; from gpt2hpc import submit, train; from gpt2hpc.cluster.launch import LocalJob\n"
        "genuine = train.describe\n"
        "def describe(run, config, **more):\n"
        "    job = genuine(run, config, **more)\n"
        f"    command = (sys.executable, {str(tiny.RANK_PROGRAM)!r}, str(run.path), *{options!r})\n"
        "    return LocalJob(command, run, job.nproc, job.job)\n"
        "train.describe = describe\n"
        f"words = {['--cluster=local', f'--nproc={nproc}', '--run-dir', str(run.path), *tiny.flags(settings)]!r}\n"
        "sys.exit(submit.cli.run(submit.main, words))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_stopped_rank(undisturbed: RunDir, run: RunDir, settings: Config) -> None:
    """Neither it nor its node answers: the others tell, and the supervisor goes on from what was saved."""
    done = supervised(run, settings, "--pause", "8", "2", "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = Ledger(run).attempts()
    assert (first.cause, first.exit_code, second.cause) == ("crashed", NodeError.exit_code, "finished")
    assert first.suspects == (first.host,)
    assert second.suspects == ()
    assert "crash 1 of 3 allowed (exit code 10)" in done.stdout
    assert "gpt2hpc: error: hung in step: no progress for " in done.stderr
    assert f"stacks of 3 ranks in {run.dumps_of(1)}; none of rank 2 on {first.host}" in done.stderr
    found = dumps(run)
    assert sorted(found) == [0, 1, 3]
    for rank, text in found.items():
        assert text.startswith(f"rank={rank} node={first.host} ")
        assert "in optimizer_step" in text, "not where the main thread was"
        assert " is watchdog\n" in text
    assert second.first_step == 6
    assert tiny.content(tiny.newest(run)) == tiny.content(tiny.newest(undisturbed))
    assert tiny.losses(run) == tiny.losses(undisturbed)


def test_the_first_rank_stopped(run: RunDir, settings: Config) -> None:
    """The one that usually tells."""
    assert tiny.run_ranks(run, settings, nproc=RANKS, options=["--pause", "5", "0"]) == NodeError.exit_code
    assert sorted(dumps(run)) == [1, 2, 3]
    assert Ledger(run).attempts()[0].suspects
    assert "none of rank 0 on " in (run.dumps_of(1) / "told.txt").read_text()
    told = [rank for rank in (1, 2, 3) if "hung in step" in run.rank_log("tiny", 0, rank).read_text()]
    assert len(told) == 1


def test_a_hang_shows_its_place(run: RunDir, settings: Config) -> None:
    """Every rank can dump, so no node is suspected; the dump and the line tell which one the others wait for."""
    assert tiny.run_ranks(run, settings, nproc=RANKS, options=["--hang", "8", "1"]) == NodeError.exit_code
    found = dumps(run)
    assert sorted(found) == [0, 1, 2, 3]
    assert [rank for rank, text in found.items() if "in hang_here" in text] == [1]
    assert Ledger(run).attempts()[0].suspects == ()
    assert "; behind the others: rank 1 on " in (run.dumps_of(1) / "told.txt").read_text()


def test_a_slow_validation_is_no_hang(run: RunDir, settings: Config) -> None:
    strict = dataclasses.replace(settings, requeue=dataclasses.replace(settings.requeue, hang_factor=3.0))
    options = ["--slow-validation", str(3 * HANG_S)]
    assert tiny.run_ranks(run, strict, nproc=2, options=options) == 0
    assert not run.dumps.exists()
    assert len(tiny.losses(run, "val")) == 3


def test_what_goes_on_slowly_is_no_hang(shared_data: Manifest, run: RunDir) -> None:
    """The first validation, and loading a checkpoint: longer than a phase may take without a sign, but no part of them is."""
    settings = impatient(tiny.config(shared_data.where, total_steps=3, eval_every=100), HANG_S)
    strict = dataclasses.replace(settings, requeue=dataclasses.replace(settings.requeue, hang_phase_minutes=0.15))
    assert tiny.run_ranks(run, strict, nproc=2, options=["--slow-batches", "2"]) == 0
    longer = dataclasses.replace(strict, train=dataclasses.replace(strict.train, total_steps=4))
    assert tiny.run_ranks(run, longer, nproc=2, restart=1, options=["--slow-tensors", "0.2"]) == 0
    assert Ledger(run).attempts()[1].first_step == 3
    assert not run.dumps.exists()


def test_a_suspended_job_is_no_hang(shared_data: Manifest, run: RunDir, settings: Config) -> None:
    """All its processes stopped for several times the limit, as by `scontrol suspend` or a machine that sleeps."""
    longer = impatient(tiny.config(shared_data.where, total_steps=400, eval_every=1000), 2.0)
    command = [
        sys.executable,
        "-m",
        "gpt2hpc",
        "train",
        "--nproc",
        "2",
        "--run-dir",
        str(run.path),
        *tiny.flags(longer),
    ]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not run.log.exists() or "5 train" not in run.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in ranks:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(8)
    assert process.wait(timeout=200) == 0
    assert not run.dumps.exists()


def test_a_stop_is_agreed_on_under_the_watchdog(run: RunDir, settings: Config) -> None:
    assert tiny.run_ranks(run, settings, nproc=2, options=["--signal", "5", "1"]) == 0
    assert tiny.newest(run).step == 6
    assert not run.dumps.exists()


@dataclasses.dataclass
class Observed:
    """What an attempt of one rank did, in its order, each part by its name; and how long its collectives may take."""

    parts: list[str]
    timeout: datetime.timedelta | None = None

    def noted(self, name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            self.parts.append(name)
            if name == "warm-up":
                self.timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
            return genuine(*arguments, **more)

        return call


@pytest.fixture(scope="module")
def observed(shared_data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    found, folder = Observed([]), tmp_path_factory.mktemp("observed")
    source = questions.write(folder / "hellaswag_val.jsonl", 300)
    settings = tiny.config(shared_data.where, total_steps=2, tokens_per_step=512, hellaswag=str(source))
    shape = {"block_size": 64, "vocab_size": 50_257, "padded_vocab_size": 50_304}
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **shape))
    patient = dataclasses.replace(settings.requeue, hang_phase_minutes=PHASE_MINUTES)
    with pytest.MonkeyPatch.context() as patched:
        for where, name, part in (
            (Watchdog, "beat", "beat"),
            (verify, "check", "shards"),
            (resume, "find", "checkpoint"),
            (Learner, "warm_up", "warm-up"),
            (Trainer, "_open_logs", "logs"),
            (hellaswag, "choices", "questions"),
        ):
            patched.setattr(where, name, found.noted(part, getattr(where, name)))
        Train(str(folder / "run"), dataclasses.replace(settings, requeue=patient))(SignalFlag())
    return found


def test_what_may_take_long_gives_signs_of_life(observed: Observed) -> None:
    """On slow disks and at a first compilation: between two such parts of a start, and between batches of questions."""
    slow = [part for part in observed.parts if part != "beat"]
    assert slow[:4] == ["shards", "checkpoint", "warm-up", "logs"]
    assert slow.count("questions") > 2
    assert all("beat" in pair for pair in itertools.pairwise(observed.parts)), observed.parts


def test_collectives_wait_as_long_as_the_watchdog(observed: Observed) -> None:
    patient = Config(requeue=dataclasses.replace(Config().requeue, hang_phase_minutes=PHASE_MINUTES))
    assert observed.timeout == collective_timeout(patient)
    assert observed.timeout > datetime.timedelta(minutes=PHASE_MINUTES)
