"""A run on the real Slurm that is struck again and again, and must end as one that nobody touched.

    python -m tests.cluster.chaos [--seed 7] [--strikes 20] [--rounds 3]

A strike ends an attempt; after some of them the newest checkpoint is damaged while the job waits, which is a fault more. What strikes,
whom and at which step follows from the seed, and is printed before the run begins; the moment within the step is the machine's.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gpt2hpc.training.checkpoint import Checkpoint
from tests import tiny
from tests.cluster import slurm
from tests.cluster.kit import ENDED, PAIRS, Ended, Job, Kit, bytes_of, logged_once, new_kit

PREEMPT, LIMIT, KILL, KILL_IN_SAVE, NODE = "preempt", "time limit", "kill", "kill in a save", "node"
KINDS = (PREEMPT, LIMIT, KILL, KILL_IN_SAVE, NODE)
CAUSES: dict[str, set[str | None]] = {
    PREEMPT: {"preempted"},
    LIMIT: {"preempted"},  # by its warning signal: the end that the ranks read when they began was far
    KILL: {"crashed"},
    KILL_IN_SAVE: {"crashed"},
    NODE: {"crashed", None},  # None: the batch shell went with its node, and nobody was left to write
}
RANKS, SAVE_EVERY, KEEP_LAST = 4, 10, 5
STEPS_A_STRIKE, FIRST_STEP, LAST_STEPS = 19, 25, 25
"""The first strike finds two checkpoints; after the last planned one there is room for a time limit that takes its time."""
PACE_S, SLOW_PACE_S = 0.1, {PREEMPT: 0.5, LIMIT: 2.0}
"""What takes Slurm a while shall not let the run come past what is planned next."""
LIMIT_S = 90
"""Slurm's warning comes a minute before the end, or up to half a minute earlier: right away, or some seconds later."""


@dataclass(frozen=True)
class Damage:
    """To a file of the newest checkpoint; `file` and `byte` are where, from 0 to 1."""

    way: str
    file: float
    byte: float

    def __str__(self) -> str:
        where = "" if self.way == "remove" else f" at {self.byte:.3f} of its bytes"
        return f"{self.way} file {self.file:.3f} of the newest checkpoint{where}"


@dataclass(frozen=True)
class Strike:
    """What ends an attempt that has taken `step`; a kind uses what it needs of the rest."""

    kind: str
    step: int
    rank: int
    node: int
    file: str
    fraction: float
    damage: Damage | None = None

    def __str__(self) -> str:
        details = {
            PREEMPT: f"on node {self.node}",
            NODE: f"{self.node} goes down and comes back {1 + 9 * self.fraction:.1f} s after the restart",
            KILL: f"of rank {self.rank}, {self.fraction:.3f} steps later",
            KILL_IN_SAVE: f": rank {self.rank} with {self.fraction:.3f} of its {self.file} file written",
        }
        words = f"step {self.step:4}: {self.kind} {details.get(self.kind, '')}".rstrip().replace(" :", ":")
        return f"{words}; then {self.damage}" if self.damage else words


@dataclass(frozen=True)
class Plan:
    seed: int
    steps: int
    strikes: tuple[Strike, ...]

    @property
    def faults(self) -> int:
        return len(self.strikes) + sum(strike.damage is not None for strike in self.strikes)

    def __str__(self) -> str:
        return "\n".join([f"SEED={self.seed}: {self.faults} faults in {self.steps} steps", *map(str, self.strikes)])


def plan(seed: int, *, strikes: int = 8) -> Plan:
    """Every kind at least once, spread over the run; after one strike in four a damaged checkpoint."""
    assert strikes >= len(KINDS), f"{strikes} strikes are less than one of each of the {len(KINDS)} kinds"
    chance = random.Random(seed)
    kinds = [*KINDS, *chance.choices(KINDS, k=strikes - len(KINDS))]
    chance.shuffle(kinds)
    whole = [number for number, kind in enumerate(kinds) if kind != NODE]  # where all ranks are known to be gone
    damaged = chance.sample(whole, min(len(whole), strikes // 4))
    return Plan(
        seed,
        FIRST_STEP + strikes * STEPS_A_STRIKE + LAST_STEPS,
        tuple(
            Strike(
                kind,
                step=FIRST_STEP + number * STEPS_A_STRIKE + chance.randrange(STEPS_A_STRIKE),
                rank=chance.randrange(RANKS),
                node=chance.randrange(2),
                file=chance.choice(("state", "state", "rank")),
                fraction=chance.random(),
                damage=_damage(chance) if number in damaged else None,
            )
            for number, kind in enumerate(kinds)
        ),
    )


def _damage(chance: random.Random) -> Damage:
    return Damage(chance.choice(("cut", "flip", "remove")), chance.random(), chance.random())


@dataclass
class Struck:
    """A strike that happened: to which attempt, at which step, and what was seen of it."""

    strike: Strike
    attempt: int
    at_step: int
    seen: str
    damaged: Checkpoint | None = None


@dataclass(kw_only=True)
class Tortured(Ended):
    plan: Plan
    struck: list[Struck]

    @property
    def faults(self) -> Counter[str]:
        kinds = Counter(struck.strike.kind for struck in self.struck)
        kinds["damaged checkpoint"] = sum(struck.damaged is not None for struck in self.struck)
        return kinds


def undisturbed(kit: Kit, planned: Plan) -> Ended:
    """The same training, left alone."""
    with kit.nodes() as nodes:
        job = _submitted(kit, f"undisturbed-{planned.seed}", nodes, planned.steps, pace_s=0.0)
        return Ended(job, kit.until_ended(job))


def torture(kit: Kit, planned: Plan, say: Callable[[str], None] = print) -> Tortured:
    """The training, through all that is planned."""
    say(str(planned))
    try:
        with kit.nodes() as nodes:
            job = _submitted(kit, f"chaos-{planned.seed}", nodes, planned.steps, pace_s=PACE_S)
            torturer = Torturer(kit, job, nodes.split(","))
            struck: list[Struck] = []
            for strike in planned.strikes:
                struck.append(torturer.strike(strike, after=struck[-1].attempt if struck else 0))
                say(f"{job.run.name}: attempt {struck[-1].attempt}, step {struck[-1].at_step}: {struck[-1].seen}")
            return Tortured(job, kit.until_ended(job), plan=planned, struck=struck)
    except Exception as error:
        error.add_note(str(planned))
        raise


def _submitted(kit: Kit, name: str, nodes: str, steps: int, *, pace_s: float) -> Job:
    settings = kit.settings(every_steps=SAVE_EVERY, keep_last=KEEP_LAST)
    env = {"STEPS": str(steps), "KIT_PACE_S": str(pace_s)}
    return kit.sbatch(name, "-p", "low", "-w", nodes, settings=settings, env=env)


class Torturer:
    def __init__(self, kit: Kit, job: Job, nodes: Sequence[str]) -> None:
        self.kit, self.job, self.nodes = kit, job, nodes
        self._kinds = {
            PREEMPT: self._preempt,
            LIMIT: self._limit,
            KILL: self._kill,
            KILL_IN_SAVE: self._kill_in_save,
            NODE: self._lose_node,
        }

    def strike(self, strike: Strike, *, after: int) -> Struck:
        """Wait for the step in an attempt after that number, strike, and wait until Slurm begins again."""
        attempt = self._reached(strike.step, after)
        at_step, restarts = self.job.step(), self._restarts()
        seen = self._kinds[strike.kind](strike, restarts)
        self._until(lambda: self._restarts() > restarts, f"the restart after {strike}")
        self._pace.unlink(missing_ok=True)
        struck = Struck(strike, attempt, at_step, seen)
        if strike.damage:
            struck.damaged = self._damage(strike.damage, attempt)
            struck.seen += f", then {struck.damaged.path.name}: {struck.damaged.damage()}"
        return struck

    def _reached(self, step: int, after: int) -> int:
        """Wait until an attempt after that number is at that step, or past it already when it resumes; returns its number."""

        def there() -> bool:
            newest = (self.job.attempts or [{"number": 0}])[-1]
            if newest["number"] <= after or newest["cause"] is not None:
                return False
            resumed = newest["first_step"] > 0 or after == 0  # only then is the log cut back to where it goes on
            return bool(resumed and self.job.step() >= max(step, newest["first_step"] + 1))

        self._until(there, f"step {step} after attempt {after}")
        return int(self.job.attempts[-1]["number"])

    def _preempt(self, strike: Strike, restarts: int) -> str:
        before = self._shown("PreemptTime")
        self._pace.write_text(str(SLOW_PACE_S[strike.kind]))
        self.kit.preempt(self.nodes[strike.node])
        self._until(lambda: self._shown("PreemptTime") not in ("None", before), "the preemption")
        return f"{self.nodes[strike.node]} preempted at {self._shown('PreemptTime')}"

    def _limit(self, strike: Strike, restarts: int) -> str:
        self._pace.write_text(str(SLOW_PACE_S[strike.kind]))
        self.kit.cluster.run("scontrol", "update", f"JobId={self.job.number}", f"EndTime=now+{LIMIT_S}")
        end = datetime.fromisoformat(self._shown("EndTime"))
        left_s = (end - datetime.now()).total_seconds()
        assert 0 < left_s <= LIMIT_S, f"the job ends at {end}"
        self._until(lambda: self._restarts() > restarts, "Slurm's warning of the time limit")
        left_s = (end - datetime.now()).total_seconds()
        self.kit.cluster.run("scontrol", "update", f"JobId={self.job.number}", "TimeLimit=60")
        return f"time limit {end}, met {left_s:.0f} s before"

    def _kill(self, strike: Strike, restarts: int) -> str:
        self._until(lambda: strike.rank in self.kit.cluster.ranks(self.job.number), f"rank {strike.rank}")
        pid = self.kit.cluster.ranks(self.job.number)[strike.rank]
        time.sleep(strike.fraction * PACE_S)
        os.kill(pid, signal.SIGKILL)
        return f"rank {strike.rank}, pid {pid}, killed"

    def _kill_in_save(self, strike: Strike, restarts: int) -> str:
        order, done = self.job.run.path / "kill-in-save", self.job.run.path / "killed-in-save"
        done.unlink(missing_ok=True)
        order.write_text(f"{strike.rank} {strike.file} {strike.fraction}")
        self._until(lambda: self._restarts() > restarts, "the kill in a save")
        written, path = done.read_text().split(maxsplit=1)
        assert Path(path).stat().st_size == int(written), f"{path} was not left as it was when its writer was killed"
        return (
            f"rank {strike.rank} killed with {written} bytes of {Path(path).name} of {Path(path).parent.name} written"
        )

    def _lose_node(self, strike: Strike, restarts: int) -> str:
        """Its power goes, its health check tells Slurm, and it comes back."""
        node = self.nodes[strike.node]
        self.kit.cluster.lose(node)
        self.kit.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=chaos")
        self._until(lambda: self._restarts() > restarts, f"the restart after {node} was lost")
        time.sleep(1 + 9 * strike.fraction)
        state = re.findall(r"State=(\S+)", self.kit.cluster.run("scontrol", "show", "node", "-o", node))[0]
        assert "DOWN" in state, f"{node} is {state}"
        self.kit.cluster.bring_back(node)
        return f"{node} was {state} and comes back"

    def _damage(self, damage: Damage, attempt: int) -> Checkpoint:
        """While the job waits to be started again."""
        newest = tiny.newest(self.job.run)
        files = sorted(newest.path.iterdir())
        path = files[int(damage.file * len(files))]
        contents = bytearray(path.read_bytes())
        byte = int(damage.byte * (len(contents) - 1))
        if damage.way == "remove":
            path.unlink()
        elif damage.way == "cut":
            path.write_bytes(contents[:byte])
        else:
            contents[byte] ^= 1
            path.write_bytes(contents)
        assert newest.damage(), f"{damage} did no harm to {path}"
        assert self.job.attempts[-1]["number"] == attempt, f"the next attempt began before {path} was damaged"
        return newest

    @property
    def _pace(self) -> Path:
        return self.job.run.path / "pace"

    def _restarts(self) -> int:
        return int(self._shown("Restarts"))

    def _shown(self, key: str) -> str:
        return self.kit.shown(self.job).get(key, "None")

    def _until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait; the end of the job is an error."""

        def happened_or_over() -> bool:
            return happened() or self._shown("JobState") in ENDED

        self.kit.until(self.job, happened_or_over, what)
        assert happened(), f"{self.job.run.name} ended before {what}:\n{self.job.told()[-5000:]}"


# Afterwards -----------------------------------------------------------------------------------------------------------


def really_struck(tortured: Tortured) -> None:
    """Nothing of the plan was left out, and all of it left its traces in the run, in its log and in Slurm."""
    assert [struck.strike for struck in tortured.struck] == list(tortured.plan.strikes)
    assert {*KINDS, "damaged checkpoint"} == {kind for kind, times in tortured.faults.items() if times}
    assert tortured.faults.total() == tortured.plan.faults
    attempts, told = tortured.job.attempts, tortured.job.told()
    for struck in tortured.struck:
        cause = attempts[struck.attempt - 1]["cause"]
        assert cause in CAUSES[struck.strike.kind], f"{struck.strike}: attempt {struck.attempt} ended as {cause}"
        if struck.strike.kind in (KILL, KILL_IN_SAVE):
            code = attempts[struck.attempt - 1]["exit_code"]  # the highest of all ranks; some may have been told to end
            assert code in (128 + signal.SIGKILL, 128 + signal.SIGTERM), f"{struck.strike}: exit code {code}"
        if struck.damaged:
            assert f"skipping the damaged checkpoint {struck.damaged.path}" in told, struck.seen
            assert attempts[struck.attempt]["first_step"] < struck.damaged.step, struck.seen
    assert int(tortured.slurm["Restarts"]) >= len(tortured.struck)
    assert len({struck.attempt for struck in tortured.struck}) == len(tortured.struck)


def unharmed(tortured: Tortured, other: Ended) -> None:
    """The bytes of the last checkpoint are the undisturbed run's, every step is logged once, and nothing is left over."""
    for job in (tortured, other):
        assert (job.slurm["JobState"], job.slurm["ExitCode"]) == ("COMPLETED", "0:0"), job.job.told()[-5000:]
        logged_once(job.job, steps=tortured.plan.steps)
    assert [attempt["cause"] for attempt in other.job.attempts] == ["finished"]
    assert tortured.job.causes[-1] == "finished"
    assert bytes_of(other.job)["step"] == tortured.plan.steps
    assert bytes_of(tortured.job) == bytes_of(other.job), f"other bytes than undisturbed\n{tortured.plan}"
    assert tiny.losses(tortured.job.run) == tiny.losses(other.job.run)
    assert not list(tortured.job.run.checkpoints.glob("*.tmp"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="default: any")
    parser.add_argument("--strikes", type=int, default=20, help="that end an attempt, in each round")
    parser.add_argument("--rounds", type=int, default=1, help="the next ones with the next seeds")
    chosen = parser.parse_args(arguments)
    _say(f"SEED={chosen.seed}")
    if reason := slurm.lacking():
        print(f"no Slurm here: {reason}", file=sys.stderr)
        return 8
    folder = Path(tempfile.mkdtemp(prefix="gpt2hpc-chaos-"))
    folder.chmod(0o755)
    try:
        with slurm.running(folder / "slurm", nodes=2 * PAIRS) as cluster, ThreadPoolExecutor(1) as beside:
            kit = new_kit(cluster, folder)
            for seed in range(chosen.seed, chosen.seed + chosen.rounds):
                _round(kit, plan(seed, strikes=chosen.strikes), beside)
    except BaseException:
        print(f"what is left of it: {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
    return 0


def _round(kit: Kit, planned: Plan, beside: ThreadPoolExecutor) -> None:
    began = time.monotonic()
    try:
        other = beside.submit(undisturbed, kit, planned)
        tortured = torture(kit, planned, _say)
        really_struck(tortured)
        unharmed(tortured, other.result())
    except BaseException:
        print(f"to repeat it: make chaos SEED={planned.seed} STRIKES={len(planned.strikes)}", file=sys.stderr)
        raise
    minutes, faults = (time.monotonic() - began) / 60, tortured.faults
    _say(f"SEED={planned.seed}: {faults.total()} faults, the same bytes, {minutes:.1f} minutes: {dict(faults)}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
