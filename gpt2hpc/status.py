"""`gpt2hpc status`: one line a run: how far, how well, and what became of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc import cli, config_io, durable
from gpt2hpc.cluster.dist_env import LOCAL
from gpt2hpc.cluster.ledger import Attempt, Cause, Decision, Ledger, Outcome
from gpt2hpc.errors import ConfigError, RunDirError
from gpt2hpc.run_dir import RunDir


@dataclass(frozen=True)
class RunStatus:
    """A run in a line; `loss` and `val_loss` are the last logged ones in nats, `pid` is rank 0's while it runs."""

    run: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    val_loss: float | None
    attempts: int
    pid: int | None
    detail: str

    def line(self, width: int) -> str:
        """A row of the table, its first column `width` wide."""
        share = f"{self.step / self.steps:4.0%}" if self.steps else "   ?"
        progress = f"{self.step:>7}/{self.steps or '?':<7} {share}"
        losses = f"{_number(self.loss)} {_number(self.val_loss)}"
        return f"{self.run:{width}} {self.state:11} {progress} {losses} {self.attempts:>8}  {self.detail}".rstrip()


HEADER = f"{'STATE':11} {'STEP':>7}/{'OF':<7} {'':4} {'LOSS':>7} {'VAL':>7} {'ATTEMPTS':>8}  DETAIL"


def read_status(run: RunDir) -> RunStatus:
    """What the files of a run directory say."""
    ledger = Ledger(run)
    attempts = ledger.attempts()
    step, loss, val_loss = _last_metrics(run.metrics)
    if attempts:
        step = max(step, attempts[-1].saved_step)  # what is logged lags behind
    state, detail = _state(run, ledger, attempts)
    running = attempts[-1].pid if attempts and state == "running" else None
    return RunStatus(run.name, state, step, _steps(run), loss, val_loss, len(attempts), running, detail)


def _state(run: RunDir, ledger: Ledger, attempts: Sequence[Attempt]) -> tuple[str, str]:
    if ledger.is_finished(_steps(run) or 0):
        return "finished", ""
    decision = ledger.decision()
    gave_up = decision.reason if decision and decision.action in ("exit", "cancelled") else ""
    if not attempts:
        return "new", gave_up or "no attempt yet"
    newest = attempts[-1]
    if newest.cause == Cause.FINISHED:
        return "extended", f"was finished at step {newest.last_step}; submit the same command to go on"
    if decision and decision.action == "cancelled":
        return "cancelled", gave_up
    if newest.cause is not None:
        return newest.cause, gave_up or _queued(decision) or _explained(newest, ledger.outcome())
    if ledger.seems_alive(newest):
        return "running", f"job {newest.job} on {newest.host}, pid {newest.pid}, {newest.world_size} ranks"
    saved = max(max(attempt.first_step, attempt.saved_step) for attempt in attempts)
    return (
        "crashed",
        f"job {newest.job} on {newest.host} ended without a word; it would resume at step {saved}",
    )


def _queued(decision: Decision | None) -> str:
    """Of a batch job that has requeued itself; a local one is seen running, or has ended with its terminal."""
    if decision is None or decision.job.startswith(LOCAL):
        return ""
    how = "requeued itself" if decision.action == "requeue" else "was submitted again as another job"
    return f"{decision.reason}; job {decision.job} {how}"


def _explained(attempt: Attempt, outcome: Outcome | None) -> str:
    if outcome and outcome.message:
        return outcome.message
    step = max(attempt.first_step, attempt.saved_step) if attempt.last_step is None else attempt.last_step
    how = "crashed" if attempt.cause == Cause.CRASHED else "ended"
    return f"attempt {attempt.number} (job {attempt.job}) {how}; it would resume at step {step}; submit the same command to go on"


def _steps(run: RunDir) -> int | None:
    try:
        return config_io.load(run.config).train.steps
    except ConfigError:
        return None


def _last_metrics(path: Path) -> tuple[int, float | None, float | None]:
    """Step, training loss and validation loss, each the last one logged."""
    step, loss, val_loss = 0, None, None
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                facts = json.loads(line)
            except ValueError:  # being written
                continue
            step, loss, val_loss = facts["step"], facts.get("loss", loss), facts.get("val_loss", val_loss)
    return step, loss, val_loss


def _number(value: float | None) -> str:
    return "      -" if value is None else f"{value:7.4f}"


def _runs(paths: Sequence[Path]) -> list[RunDir]:
    """The run directories among `paths` and right below them."""
    found = []
    for path in paths:
        if not path.is_dir():
            raise RunDirError(f"{path} is not a directory; give a run directory, or a directory of them")
        inside = [path] if _is_run(RunDir(path)) else sorted(path.iterdir())
        found += [RunDir(each) for each in inside if _is_run(RunDir(each))]
    return found


def _is_run(run: RunDir) -> bool:
    return run.config.exists() or run.decision.exists() or run.attempts.is_dir()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpt2hpc status", description="One line a run.")
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        metavar="DIR",
        help="runs, or directories of runs (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args(argv)
    rows = [read_status(run) for run in _runs(arguments.paths)]
    if arguments.json:
        cli.say(durable.to_json([dataclasses.asdict(row) for row in rows]).rstrip())
        return 0
    width = max([3, *(len(row.run) for row in rows)])
    cli.say("\n".join([f"{'RUN':{width}} {HEADER}", *(row.line(width) for row in rows)]) if rows else "no runs")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
