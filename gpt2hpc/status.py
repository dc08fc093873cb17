"""`gpt2hpc status`: one line a run, or a directory that is prepared: how far, how well, and what became of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc import cli, config_io, durable
from gpt2hpc.cluster.dist_env import LOCAL
from gpt2hpc.cluster.ledger import Attempt, Cause, Decision, Ledger, Outcome
from gpt2hpc.config import Config
from gpt2hpc.data import survey
from gpt2hpc.data.survey import Survey
from gpt2hpc.errors import ConfigError, DataError, RunDirError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import uploads
from gpt2hpc.training.uploads import Lag


@dataclass(frozen=True)
class RunStatus:
    """A run in a line; `loss` and `val_loss` are the last logged ones in nats, `pid` is rank 0's while it runs.

    `uploads` is how far the Hub is behind, of a run that uploads its checkpoints.
    """

    run: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    val_loss: float | None
    attempts: int
    pid: int | None
    detail: str
    uploads: Lag | None = None

    def line(self, width: int) -> str:
        """A row of the table, its first column `width` wide."""
        share = f"{self.step / self.steps:4.0%}" if self.steps else "   ?"
        progress = f"{self.step:>7}/{self.steps or '?':<7} {share}"
        losses = f"{_number(self.loss)} {_number(self.val_loss)}"
        detail = "; ".join(filter(None, (self.detail, self.uploads.line if self.uploads else "")))
        return f"{self.run:{width}} {self.state:11} {progress} {losses} {self.attempts:>8}  {detail}".rstrip()


HEADER = f"{'STATE':11} {'STEP':>7}/{'OF':<7} {'':4} {'LOSS':>7} {'VAL':>7} {'ATTEMPTS':>8}  DETAIL"


def read_status(run: RunDir) -> RunStatus:
    """What the files of a run directory say."""
    ledger = Ledger(run)
    attempts = ledger.attempts()
    step, loss, val_loss = _last_metrics(run.metrics)
    if attempts:
        step = max(step, attempts[-1].saved_step)  # what is logged lags behind
    config = _config(run)
    steps, repo = (config.train.steps, config.checkpoint.repo) if config else (None, None)
    state, detail = _state(ledger, attempts, steps)
    running = attempts[-1].pid if attempts and state == "running" else None
    lag = uploads.lag(run, repo) if repo else None
    return RunStatus(run.name, state, step, steps, loss, val_loss, len(attempts), running, detail, lag)


@dataclass(frozen=True)
class DataStatus:
    """A prepared or half-prepared directory in a line of the same table."""

    found: Survey

    @property
    def run(self) -> str:
        return self.found.data

    def line(self, width: int) -> str:
        found = self.found
        progress = f"{found.units_done:>7}/{found.units:<7} {found.units_done / max(1, found.units):4.0%}"
        told = [f"units; {found.tokens / 1e6:,.1f} Mtok"]
        if found.tokens_per_s is not None:
            told.append(f"{found.tokens_per_s / 1e6:,.2f} Mtok/s")
        if found.eta_s is not None:
            told.append(f"ETA {cli.duration(found.eta_s)}")
        if found.state == "unfinished" and found.last_unit_s_ago is not None:
            told.append(f"the last unit was done {cli.duration(found.last_unit_s_ago)} ago")
        return f"{self.run:{width}} {found.state:11} {progress} {'-':>7} {'-':>7} {'-':>8}  {', '.join(told)}"


def _state(ledger: Ledger, attempts: Sequence[Attempt], steps: int | None) -> tuple[str, str]:
    if ledger.is_finished(steps or 0):
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


def _config(run: RunDir) -> Config | None:
    with contextlib.suppress(ConfigError):
        return config_io.load(run.config)
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
            step = max(step, facts["step"])  # a save is logged once it is done, some steps later
            loss, val_loss = facts.get("loss", loss), facts.get("val_loss", val_loss)
    return step, loss, val_loss


def _number(value: float | None) -> str:
    return "      -" if value is None else f"{value:7.4f}"


def _found(paths: Sequence[Path]) -> list[RunStatus | DataStatus]:
    """The run directories and the prepared ones among `paths` and right below them."""
    found: list[RunStatus | DataStatus] = []
    for path in paths:
        if not path.is_dir():
            raise RunDirError(f"{path} is not a directory; give a run directory, or a directory of them")
        inside = [path] if _is_run(RunDir(path)) or survey.is_prepared(path) else sorted(path.iterdir())
        for each in inside:
            if survey.is_prepared(each):
                found.append(DataStatus(_surveyed(each)))
            elif _is_run(RunDir(each)):
                found.append(read_status(RunDir(each)))
    return found


def _surveyed(directory: Path) -> Survey:
    """One that cannot be read is a row like the others."""
    try:
        return survey.survey(directory)
    except DataError as error:
        cli.warn(error.line)
        return Survey(directory.name, "damaged", 0, 0, 0, None, None, None)


def _is_run(run: RunDir) -> bool:
    return run.config.exists() or run.decision.exists() or run.attempts.is_dir()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gpt2hpc status", description="One line a run, or a directory that is being prepared."
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        metavar="DIR",
        help="runs, prepared directories, or directories of them (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    cli.add_examples(
        parser,
        "gpt2hpc status                          # what is below runs/",
        "gpt2hpc status runs/mine data/mine --json",
    )
    arguments = parser.parse_args(argv)
    rows = _found(arguments.paths)
    if arguments.json:
        facts = [dataclasses.asdict(row.found if isinstance(row, DataStatus) else row) for row in rows]
        cli.say(durable.to_json(facts).rstrip())
        return 0
    width = max([3, *(len(row.run) for row in rows)])
    cli.say("\n".join([f"{'RUN':{width}} {HEADER}", *(row.line(width) for row in rows)]) if rows else "no runs")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
