"""`gpt2hpc logs`: what the jobs of a run have printed, attempt after attempt, and what they print now."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gpt2hpc import cli
from gpt2hpc.cluster import run_jobs
from gpt2hpc.cluster.dist_env import LOCAL
from gpt2hpc.cluster.ledger import Decision, Ledger
from gpt2hpc.errors import DataError, UsageError
from gpt2hpc.reporting import job_logs, run_status, runs
from gpt2hpc.reporting.job_logs import JobLog
from gpt2hpc.reporting.run_state import WAITS, WORKS
from gpt2hpc.run_dir import RunDir

POLL_S = 1.0
FOLLOWED_LINES = 20
SETTLE_S = {"over": 3.0, "silent": 30.0}
"""How long nothing more must come until a run in which nothing happens is left alone."""


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(
        prog="gpt2hpc logs",
        description="What the jobs of a run have printed: all attempts, all ranks, in the order of their jobs.",
    )
    cli.add_examples(parser, "gpt2hpc logs -f runs/mine", "gpt2hpc logs runs/mine --attempt 2 --rank 3 -n 50")
    runs.add_argument(parser)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on, through requeues, until the run is over, or Ctrl-C"
    )
    parser.add_argument(
        "-n", "--lines", type=int, metavar="LINES", help=f"only the last ones (default: all; with -f {FOLLOWED_LINES})"
    )
    parser.add_argument("--attempt", type=int, metavar="N", help="of one attempt")
    parser.add_argument("--rank", type=int, metavar="N", help="of one rank")
    arguments = parser.parse_args(argv)
    run = runs.one(arguments.run)
    if arguments.follow and arguments.attempt is not None:
        raise UsageError(
            f"--attempt={arguments.attempt} is one attempt, and -f goes on with those that follow; give one of the two"
        )
    if arguments.lines is not None and arguments.lines < 0:
        raise UsageError(f"--lines={arguments.lines} must be 0 or more")
    if arguments.follow:
        most = FOLLOWED_LINES if arguments.lines is None else arguments.lines
        with contextlib.suppress(KeyboardInterrupt):
            _follow(run, Printer(arguments.rank), most)
        return 0
    shown = _selected(run, attempt=arguments.attempt, rank=arguments.rank)
    if not shown:
        raise DataError(_nothing(run, arguments.attempt, arguments.rank))
    printer = Printer(None)
    for log, lines in _last(shown, arguments.lines):
        printer.print(log, lines)
    return 0


class Printer:
    """Lines, with the name of their file before them where that changes; and how far each file was printed."""

    def __init__(self, rank: int | None) -> None:
        self._rank = rank
        self._current: Path | None = None
        self._read: dict[Path, int] = {}

    def print(self, log: JobLog, lines: Sequence[str]) -> None:
        if not lines:
            return
        if self._current != log.path:
            cli.say(f"{'' if self._current is None else chr(10)}==> {log.path} <==")
            self._current = log.path
        cli.say("\n".join(lines))

    def take(self, log: JobLog) -> list[str]:
        """What is new in it, in whole lines, which count as printed then."""
        before = self._read.get(log.path, 0)
        try:
            with log.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < before:  # a restart without --open-mode=append has begun anew
                    before = 0
                file.seek(before)
                new = file.read()
        except FileNotFoundError:  # deleted while it is followed; another may come by its name
            self._read[log.path] = 0
            return []
        end = new.rfind(b"\n") + 1
        self._read[log.path] = before + end
        lines = job_logs.own(log, new[:end].decode(errors="replace").splitlines())
        return lines if self._rank is None else job_logs.of_rank(log, lines, self._rank)


def _selected(run: RunDir, *, attempt: int | None, rank: int | None) -> list[tuple[JobLog, list[str]]]:
    """The lines asked for of each log that has any."""
    attempts = Ledger(run).attempts()
    wanted = None
    if attempt is not None:
        wanted = next((each for each in attempts if each.number == attempt), None)
        if wanted is None:
            there = f"attempts 1 to {attempts[-1].number}" if attempts else "no attempt yet"
            raise UsageError(f"--attempt={attempt}: {run.path} has {there}")
    selected = []
    for log in job_logs.found(run):
        lines = job_logs.lines(log) if wanted is None else job_logs.of_attempt(log, wanted, attempts)
        if rank is not None:
            lines = job_logs.of_rank(log, lines, rank)
        if lines:
            selected.append((log, lines))
    return selected


def _last(shown: Sequence[tuple[JobLog, list[str]]], most: int | None) -> list[tuple[JobLog, list[str]]]:
    """The last `most` lines of all."""
    if most is None:
        return list(shown)
    kept: list[tuple[JobLog, list[str]]] = []
    for log, lines in reversed(shown):
        if most <= 0:
            break
        kept.insert(0, (log, lines[-most:]))
        most -= len(lines)
    return kept


def _nothing(run: RunDir, attempt: int | None, rank: int | None) -> str:
    newest = Ledger(run).newest()
    if rank is not None and job_logs.found(run):
        return (
            f"--rank={rank}: {run.path} has no lines of that rank; in a log of several ranks they are told apart by `srun --label`, "
            "which gpt2hpc's own scripts use"
        )
    if newest is not None and newest.job.startswith(LOCAL):
        return f"{run.path} has no logs: rank 0 of a local job prints to its terminal only; its losses are in {run.log}"
    which = "no log that holds it" if attempt is not None else "no log yet"
    return f"{run.path} has {which}; `gpt2hpc status {run.quoted}` says whether a job of it waits"


def _follow(run: RunDir, printer: Printer, most: int) -> None:
    """Print the last lines, then all that come, until no more are to be expected."""
    watch = _Watch(run)
    known: dict[Path, JobLog] = {}
    for log, lines in _last([(log, printer.take(log)) for log in job_logs.found(run)], most):
        printer.print(log, lines)
    over_since: float | None = None
    while True:
        state = watch.look()  # before the last look at the logs, so that nothing is missed
        time.sleep(POLL_S)
        known |= {log.path: log for log in job_logs.found(run, ask_slurm=watch.just_asked)}
        for log in known.values():
            if lines := printer.take(log):
                printer.print(log, lines)
                over_since = None
        if state == "goes on":
            over_since = None
        else:
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since >= SETTLE_S[state]:
                cli.aside(f"gpt2hpc: {watch.said}")
                return


class _Watch:
    """Whether more is to be expected; Slurm is asked about that now and then."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._inquiry = run_status.Inquiry()
        self.said = ""
        self.just_asked = False

    def look(self) -> Literal["goes on", "over", "silent"]:
        """`silent` where nothing runs and nobody has said why yet, as between an end and what is decided then."""
        self.just_asked = self._inquiry.renew([self._run])
        answers = self._inquiry.answers
        status, decision = run_status.read_status(self._run, answers), Ledger(self._run).decision()
        said = f"{status.run}: {status.state}" + (f", {status.detail}" if status.detail else "")
        if status.state in WAITS and said != self.said:
            cli.aside(f"gpt2hpc: {said}")
        self.said = said
        again = decision is not None and decision.goes_on
        unseen = decision is not None and (decision.job.startswith(LOCAL) or answers.queue is None)
        lost = again and decision is not None and decision.action == "resubmit" and self._has_no_successor(decision)
        if status.state in (*WAITS, *WORKS) or (again and unseen and not lost):
            return "goes on"
        if lost:  # it is submitted in a moment, or was not
            return "silent"
        return "over" if decision is not None or status.state == "finished" else "silent"

    def _has_no_successor(self, decision: Decision) -> bool:
        return not decision.job.startswith(LOCAL) and run_jobs.successor(self._run, decision.job) is None


if __name__ == "__main__":
    sys.exit(cli.run(main))
