"""What the threads of a hung attempt were doing: `dumps/0001/rank0.txt`, … in the run directory, and `told.txt`, what was made of it.

A rank that hangs in C code, or is stopped, may leave none; the node that it runs on is then suspected. Nothing here needs the
other ranks to answer, since they may not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc import cli, durable
from gpt2hpc.cluster.ledger import Attempt, Ledger, utc_now
from gpt2hpc.errors import RunDirError
from gpt2hpc.run_dir import RunDir

LOOKS = 4
"""At the others' conclusion, before a rank draws its own."""


@dataclass(frozen=True)
class Silence:
    """For how many seconds a rank was silent, doing what, where its limit was; `beats` are its signs of progress before."""

    phase: str
    seconds: float
    limit_s: float
    beats: int


@dataclass(frozen=True)
class Dumps:
    """Those of an attempt, seen by one rank.

    Args:
        run: The run directory.
        ledger: Is told of the nodes under suspicion.
        attempt: The attempt.
        rank: This rank.
        nodes: The node of each rank.
    """

    run: RunDir
    ledger: Ledger
    attempt: Attempt
    rank: int
    nodes: Sequence[str]

    @property
    def _folder(self) -> Path:
        return self.run.dumps_of(self.attempt.number)

    @property
    def _told(self) -> Path:
        return self._folder / "told.txt"

    @property
    def _teller(self) -> Path:
        """Claimed by exclusive creation."""
        return self._folder / "teller"

    def are_begun(self) -> bool:
        """Whether another rank has dumped; a look at the directory, for those alone that are silent themselves."""
        return any(self._folder.glob("rank*.txt"))

    def are_complete(self) -> bool:
        return not self._missing()

    def _missing(self) -> list[int]:
        """The ranks without a dump, by one look at the directory: there may be a thousand of them."""
        there = set(self._folder.glob("rank*.txt"))
        return [rank for rank in range(len(self.nodes)) if self.run.dump(self.attempt.number, rank) not in there]

    def write(self, silence: Silence) -> None:
        """The stack of every thread of this process, into a file that is there in full or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self.run.dump(self.attempt.number, self.rank)
        with durable.publishing(path) as file:
            file.write(self._heading(silence).encode())
            file.flush()
            faulthandler.dump_traceback(file=file.fileno(), all_threads=True)

    def _heading(self, silence: Silence) -> str:
        """Facts on the first line, as `name=value`; then which thread has which name."""
        facts = {
            "rank": self.rank,
            "node": self.nodes[self.rank],
            "pid": os.getpid(),
            "time": utc_now(),
            "beats": silence.beats,
            "silent_s": f"{silence.seconds:.1f}",
            "limit_s": f"{silence.limit_s:.1f}",
            "in": silence.phase.replace(" ", "-"),
        }
        threads = [f"Thread 0x{thread.ident or 0:016x} is {thread.name}" for thread in threading.enumerate()]
        return "\n".join([" ".join(f"{name}={value}" for name, value in facts.items()), *threads, "", ""])

    def withdraw(self) -> None:
        """It was no hang, so nothing shall be made of this rank's dump; unless it went on only since the others have ended."""
        if self._told.exists():
            return
        self.run.dump(self.attempt.number, self.rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def conclude(self, sleep: Callable[[], bool]) -> None:
        """Once, on the first rank that can: say where the dumps are, and suspect the nodes of ranks without one.

        The others wait for that, since the first process that ends takes all with it.
        """
        missing = self._missing()
        there = [rank for rank in range(len(self.nodes)) if rank not in missing]
        if self.rank != there[0] and self._is_told(sleep):
            return
        if not durable.create_text(self._teller, f"rank {self.rank}\n"):
            self._is_told(sleep)
            return
        line = self._line(missing, there)
        with contextlib.suppress(RunDirError):  # a newer attempt took over, and needs no suspects of ours
            self.ledger.note(self.attempt, suspects=tuple(sorted({self.nodes[rank] for rank in missing})))
        # Not by print, for which a thread that hangs may hold the lock.
        os.write(sys.stderr.fileno(), f"gpt2hpc: error: {line}\n".encode())
        durable.publish_text(self._told, f"{line}\n")

    def _is_told(self, sleep: Callable[[], bool]) -> bool:
        """Whether another rank tells it, soon."""
        for _ in range(LOOKS):
            if self._told.exists():
                return True
            sleep()
        return self._told.exists()

    def _line(self, missing: Sequence[int], there: Sequence[int]) -> str:
        facts = {rank: self._facts(rank) for rank in there}
        mine = facts[self.rank]
        line = f"hung in {mine['in']}: no progress for {mine['silent_s']} s (limit {mine['limit_s']} s); "
        line += f"stacks of {cli.plural(len(there), 'rank')} in {self._folder}"
        if missing:
            return line + "; none of " + ", ".join(f"rank {rank} on {self.nodes[rank]}" for rank in missing)
        beats = {rank: int(each["beats"]) for rank, each in facts.items()}
        behind = [rank for rank, count in beats.items() if count == min(beats.values())]
        if len(behind) < len(there):
            line += "; behind the others: " + ", ".join(f"rank {rank} on {self.nodes[rank]}" for rank in behind)
        return line

    def _facts(self, rank: int) -> dict[str, str]:
        first, _, _ = self.run.dump(self.attempt.number, rank).read_text(encoding="utf-8").partition("\n")
        return dict(word.split("=", 1) for word in first.split())
