"""What the threads of a hung attempt were doing: `dumps/0001/rank0.txt`, … in the run directory, and `told.txt`, what was made of it.

A rank that hangs in C code, or is stopped, may leave none; the node that it runs on is then suspected. Nothing here needs the
other ranks to answer, since they may not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc import cli, durable
from gpt2hpc.cluster.ledger import Attempt, Ledger, utc_now
from gpt2hpc.errors import NodeError, RunDirError
from gpt2hpc.run_dir import RunDir

LOOKS = 4
"""At the others' conclusion, before a rank draws its own."""
BLAMED = 0.25
"""Of the nodes: where more left no dump, their file server is to blame, and none of them; one node may always be."""


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

    def withdraw(self) -> bool:
        """It was no hang, so nothing shall be made of this rank's dump; False where it went on only since the others have ended."""
        if self._told.exists():
            return False
        self.run.dump(self.attempt.number, self.rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        return True

    def conclude(self, goes_on: Callable[[], bool], poll_s: float) -> bool:
        """Once, on the first rank that can: say where the dumps are, and suspect the nodes of ranks without one.

        The others wait for that, since the first process that ends takes all with it. False where nothing was told, as this rank
        `goes_on` after all.
        """
        missing = set(self._missing())
        first = next((rank for rank in range(len(self.nodes)) if rank not in missing), self.rank)
        if self.rank != first and self._is_told(goes_on, poll_s):
            return True
        if not durable.create_text(self._teller, f"rank {self.rank}\n"):
            return self._is_told(goes_on, poll_s) or not goes_on()
        # Looked at again: that a file was made there shows a directory of NFS as it is now.
        line, suspects = self._made_of(self._missing())
        if not goes_on():
            complain(f"error: {line}")  # which a terminal may hold up until it goes on
        if goes_on():
            self._teller.unlink(missing_ok=True)
            return False
        with contextlib.suppress(RunDirError):  # a newer attempt took over, and needs no suspects of ours
            self.ledger.note(self.attempt, suspects=suspects, exit_code=NodeError.exit_code)
        durable.publish_text(self._told, f"{line}\n")
        return True

    def _is_told(self, goes_on: Callable[[], bool], poll_s: float) -> bool:
        """Whether another rank tells it, soon."""
        for _ in range(LOOKS):
            if self._told.exists() or goes_on():
                break
            time.sleep(poll_s)
        return self._told.exists()

    def _made_of(self, missing: Sequence[int]) -> tuple[str, tuple[str, ...]]:
        """What to say, and the nodes under suspicion."""
        line = self._line(missing, [rank for rank in range(len(self.nodes)) if rank not in missing])
        suspects = tuple(sorted({self.nodes[rank] for rank in missing}))
        nodes = len(set(self.nodes))
        if len(suspects) > max(1, BLAMED * nodes):
            return f"{line}; {len(suspects)} of {nodes} nodes are too many to blame: look at the file server", ()
        return line, suspects

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


def complain(text: str) -> None:
    """Not by print, for which a thread that hangs may hold the lock, and for which stderr may be closed."""
    with contextlib.suppress(OSError):
        os.write(2, f"gpt2hpc: {text}\n".encode())
