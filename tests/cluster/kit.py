"""Driving jobs on the real Slurm: submit them as a user does, act on them, wait, and look at what they left."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc.config import Config
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.cluster.slurm import Cluster

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 100, 20
PAIRS = 4
"""Of nodes; as many drives run at once."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")


def drives(*functions: Callable[[Kit], Any]) -> pytest.MarkDecorator:
    """Names what a test looks at; see conftest.py."""
    return pytest.mark.drives.with_args(*functions)


LONG: list[Callable[[Kit], Any]] = []


def long(drive: Callable[[Kit], Any]) -> Callable[[Kit], Any]:
    """Marks a drive that takes minutes, and so begins before the others."""
    LONG.append(drive)
    return drive


@dataclass
class Job:
    """A submitted job and its run."""

    number: str
    run: RunDir
    log: Path

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.run.attempts.glob("[0-9]*.json"))]

    @property
    def causes(self) -> list[str | None]:
        return [attempt["cause"] for attempt in self.attempts]

    def step(self) -> int:
        """The last step in its log.txt."""
        with contextlib.suppress(OSError):
            steps = [int(line.split()[0]) for line in self.run.log.read_text().splitlines() if " train " in line]
            return max(steps, default=0)
        return 0

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log"


@dataclass
class Kit:
    """A cluster, data, and pairs of nodes that a drive has to itself."""

    cluster: Cluster
    folder: Path
    pairs: queue.Queue[tuple[str, str]] = field(default_factory=queue.Queue)
    python: str = sys.executable
    template: Path = ROOT / "slurm" / "train_124m.sbatch"

    @property
    def site(self) -> str:
        """The site profile of `submit`: the Python of the jobs is the one with the pace and the faults."""
        return f"python: {ROOT / 'tests' / 'cluster' / 'python'}"

    @property
    def variables(self) -> dict[str, str]:
        """The same for sbatch, and what paced.py reads."""
        python = str(ROOT / "tests" / "cluster" / "python")
        return {"PYTHON": python, "KIT_PYTHON": self.python, "KIT_PACE_S": "0.1"}

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def settings(self, **checkpoint: Any) -> Config:
        config = tiny.config(self.data, total_steps=STEPS, eval_every=1000)
        changed = dataclasses.replace(
            config.checkpoint, **{"every_steps": SAVE_EVERY, "stop_margin_s": 5.0, "keep_last": 3, **checkpoint}
        )
        return dataclasses.replace(config, checkpoint=changed)

    @contextlib.contextmanager
    def nodes(self) -> Iterator[str]:
        """Two nodes, as `n3,n4`."""
        pair = self.pairs.get()
        try:
            yield ",".join(pair)
        finally:
            self.pairs.put(pair)

    @staticmethod
    def others(names: Sequence[str]) -> str:
        """All nodes but these, for --exclude."""
        return ",".join(name for number in range(1, 2 * PAIRS + 1) if (name := f"n{number}") not in names)

    # Submitting: one task a rank, two nodes with two ranks each unless the flags say otherwise

    def sbatch(
        self,
        name: str,
        *flags: str,
        settings: Config | None = None,
        more: Sequence[str] = (),
        env: dict[str, str] | None = None,
        template: Path | None = None,
    ) -> Job:
        """`sbatch slurm/train_124m.sbatch` as its header says: sizes by flags and variables, settings after the script."""
        run, log = RunDir(self.folder / "runs" / name), self.folder / f"{name}-%j.log"
        hidden = ("--train.total_steps", "--data.dir")
        words = [flag for flag in tiny.flags(settings or self.settings()) if not flag.startswith(hidden)]
        variables = {
            **self.variables,
            "DATA": str(self.data),
            "RUN_DIR": str(run.path),
            "STEPS": str(STEPS),
            **(env or {}),
        }
        default = ["--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={log}"]
        command = ["sbatch", "--parsable", *default, *flags, str(template or self.template), *words, *more]
        number = self._run(command, variables).strip()
        return Job(number, run, Path(str(log).replace("%j", number)))

    def submit(
        self, name: str, *flags: str, settings: Config | None = None, env: dict[str, str] | None = None, nodes: str
    ) -> Job:
        """`python -m gpt2hpc.submit --nodes 2`, with a site profile that names the Python of the jobs."""
        run, site = RunDir(self.folder / "runs" / name), self.folder / f"{name}.yaml"
        site.write_text(f"{self.site}\nsbatch: {{nodelist: '{nodes}'}}\ncpus_per_task: 1\n")
        options = ["--nodes=2", "--nproc=2", "--time=10", f"--site={site}", f"--run-dir={run.path}"]
        words = tiny.flags(settings or self.settings())
        told = self._run(
            [self.python, "-m", "gpt2hpc.submit", *options, *flags, *words], {**self.variables, **(env or {})}
        )
        number = told.split("job ")[1].split(":")[0]
        return Job(number, run, run.slurm / f"{number}_0_log.out")

    def _run(self, command: Sequence[str], variables: dict[str, str]) -> str:
        environment = {**self.cluster.environment, **variables}
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    # Acting and waiting

    def preempt(self, node: str) -> None:
        """A job of higher priority takes the whole node for a moment."""
        command = [
            "sbatch",
            "--parsable",
            "-p",
            "high",
            "--exclusive",
            "-w",
            node,
            "--output=/dev/null",
            "--wrap",
            "sleep 3",
        ]
        self._run(command, {})

    def release_on(self, job: Job, names: Sequence[str]) -> None:
        """Let a held job begin when all of these nodes are free, so that it is known which of them it gets."""
        states = ("sinfo", "-h", "-N", "-p", "main", "-n", ",".join(names), "-o", "%t")
        self.until(job, lambda: set(self.cluster.run(*states).split()) == {"idle"}, "free nodes")
        self.cluster.run("scontrol", "release", job.number)

    def signal(self, job: Job, *flags: str) -> None:
        self.cluster.run("scancel", *flags, job.number)

    def until(self, job: Job, happened: Callable[[], Any], what: str, *, seconds: float = 240) -> None:
        """Wait; if it does not happen, say what the job was doing."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                facts = {
                    key: self.shown(job).get(key) for key in ("JobState", "Reason", "Restarts", "NodeList", "ExitCode")
                }
                raise AssertionError(f"{what} did not happen: {facts}\n{job.told()[-5000:]}")
            time.sleep(0.2)

    def until_step(self, job: Job, step: int) -> None:
        def there_or_over() -> bool:
            return job.step() >= step or self.shown(job)["JobState"] in ENDED

        self.until(job, there_or_over, f"step {step} of {job.run.name}")
        assert job.step() >= step, f"{job.run.name} ended at step {job.step()}:\n{job.told()[-5000:]}"

    def until_saved(self, job: Job, step: int) -> None:
        """Wait until that step is the last one saved, or came before it: a save is there some steps after its own."""
        self.until(
            job, lambda: job.attempts[-1]["saved_step"] >= step, f"the checkpoint of step {step} of {job.run.name}"
        )

    def until_ended(self, job: Job, *, seconds: float = 240) -> dict[str, str]:
        """Wait until Slurm has done with the job; returns its facts."""
        self.until(job, lambda: self.shown(job)["JobState"] in ENDED, f"the end of {job.run.name}", seconds=seconds)
        return self.shown(job)

    def shown(self, job: Job) -> dict[str, str]:
        return self.cluster.job(job.number)


def new_kit(cluster: Cluster, folder: Path, *, pairs: int = PAIRS) -> Kit:
    """With data, and with all of the cluster's nodes."""
    kit = Kit(cluster, folder)
    tiny.make_data(kit.data)
    for number in range(pairs):
        kit.pairs.put((f"n{2 * number + 1}", f"n{2 * number + 2}"))
    return kit


@dataclass
class Ended:
    """A job after its end: Slurm's facts, and what the drive took down on the way."""

    job: Job
    slurm: dict[str, str]
    at_step: int = 0
    at: float = field(default_factory=time.monotonic)


def bytes_of(job: Job) -> dict[str, Any]:
    return tiny.content(tiny.newest(job.run))


def logged_once(job: Job, *, steps: int = STEPS) -> None:
    logged = [json.loads(line)["step"] for line in job.run.metrics.read_text().splitlines() if '"loss"' in line]
    assert logged == list(range(1, steps + 1))
    assert sorted(tiny.losses(job.run)) == logged


def finished_as(job: Ended, undisturbed: Ended, *, causes: list[str | None], restarts: int | None = None) -> None:
    assert job.slurm["JobState"] == "COMPLETED", job.job.told()
    assert job.slurm["ExitCode"] == "0:0"
    assert int(job.slurm["Restarts"]) == (len(causes) - 1 if restarts is None else restarts)
    assert job.job.causes == causes
    assert bytes_of(job.job) == bytes_of(undisturbed.job)
    logged_once(job.job)


def resumed_exactly(job: Ended) -> None:
    """Every attempt began where the one before had saved and stopped."""
    attempts = job.job.attempts
    for before, after in itertools.pairwise(attempts):
        assert before["saved_step"] == before["last_step"] == after["first_step"] > 0


def stays_away(cancelled: Ended, kit: Kit, *, seconds: float = 60) -> None:
    """That long after its end nothing has brought the job back; other drives run meanwhile."""
    time.sleep(max(0.0, cancelled.at + seconds - time.monotonic()))
    for shown in (cancelled.slurm, kit.shown(cancelled.job)):
        assert shown["JobState"] == "CANCELLED", cancelled.job.told()
        assert [shown[key] for key in ("Restarts", "EndTime")] == [
            cancelled.slurm[key] for key in ("Restarts", "EndTime")
        ]
