"""`gpt2hpc resume`: go on with a run: release its job, submit it again as it was, or run it here again."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli, starting
from gpt2hpc.cluster import foreground, orders, run_jobs
from gpt2hpc.cluster.dist_env import LOCAL
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.cluster.queries import Queued
from gpt2hpc.cluster.supervisor import supervise
from gpt2hpc.errors import MissingError, RunDirError, UsageError
from gpt2hpc.reporting import run_status, runs
from gpt2hpc.run_dir import RunDir
from gpt2hpc.train import local_job

SUBMIT_S, ENDING_S, POLL_S = 120.0, 120.0, 5.0


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(
        prog="gpt2hpc resume",
        usage="gpt2hpc resume [-h] [RUN] [-- OPTION …]",
        description="Go on with a run: a held job is released, one that has ended is submitted again, a local one goes on here.",
    )
    cli.add_examples(parser, "gpt2hpc resume runs/mine", "gpt2hpc resume runs/mine -- --time=2:00:00 --exclude=n7")
    runs.add_argument(parser)
    own, more = _split(argv)
    arguments = parser.parse_args(own)
    found = runs.named(arguments.run)
    return max(_resume(run, more) for run in found)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and after `--` what is sbatch's."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _resume(run: RunDir, more: Sequence[str]) -> int:
    status, newest = run_status.read_status(run), Ledger(run).newest()
    if status.state == "finished":
        cli.say(f"{run.path} is finished, at step {status.step}; to go further, submit it with a larger --steps")
        return 0
    if live := _after_the_end(run):
        _release_or_tell(run, live)
        return 0
    if foreground.find(run) or (newest is not None and Ledger(run).seems_alive(newest)):
        cli.say(f"{run.path} runs already: {status.detail}")
        return 0
    if newest is not None and newest.job.startswith(LOCAL):
        return _here(run, newest.world_size, more)
    _submit(run, more)
    return 0


def _after_the_end(run: RunDir) -> list[Queued]:
    """Its jobs that wait or run; one that has come to its end, and writes that down, is waited for."""
    deadline, told = time.monotonic() + ENDING_S, False
    while live := run_jobs.live(run):
        status = run_status.read_status(run, run_status.ask([run]))
        if status.state != "ending" or time.monotonic() > deadline:
            break
        if not told:
            cli.say(f"{run.path}: waiting for the end of job {status.job}")
            told = True
        time.sleep(POLL_S)
    return live


def _release_or_tell(run: RunDir, live: Sequence[Queued]) -> None:
    held = [row for row in live if row.is_held]
    for row in held:
        orders.release(row.number)
        cli.say(
            f"{run.path}: job {row.number} was held ({row.reason if row.state == 'PENDING' else row.state}) and is released"
        )
    if not held:
        status = run_status.read_status(run, run_status.ask([run]))
        cli.say(f"{run.path} is in the queue already: {status.state}, {status.detail}")


def _here(run: RunDir, world_size: int, more: Sequence[str]) -> int:
    """In the foreground, with the settings and the number of processes that it had."""
    if more:
        raise UsageError(f"{' '.join(more)}: options of sbatch, but {run.path} is a local run; leave them out")
    local = local_job(run, starting.stored_config(run), nproc=world_size)
    return 0 if local is None else supervise(local)


def _submit(run: RunDir, more: Sequence[str]) -> None:
    if not run.resume_script.exists():
        raise RunDirError(
            f"{run.path} has no {run.resume_script.name}, which the first start of a job writes; submit it by the same command again"
        )
    _refuse_a_copy(run)
    if shutil.which("sbatch") is None:
        raise MissingError("sbatch is not on PATH, so this machine cannot submit to Slurm; use a login node")
    run.stop.unlink(missing_ok=True)  # an old wish
    try:
        done = subprocess.run(
            ["bash", str(run.resume_script), *more],
            capture_output=True,
            text=True,
            timeout=SUBMIT_S,
            check=False,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise MissingError(
            f"sbatch does not answer within {SUBMIT_S:g} s; `gpt2hpc status {run.quoted}` shows if it did"
        ) from None
    said = done.stdout.split()
    if done.returncode != 0 or not said:
        raise UsageError(
            f"{run.resume_script}: {' '.join((done.stderr or done.stdout).split()) or 'printed no number'}"
        )
    cli.say(f"{run.path}: submitted again as job {said[-1]}")
    cli.say(f"watch it with `gpt2hpc status --watch {run.quoted}` and `gpt2hpc logs -f {run.quoted}`")


def _refuse_a_copy(run: RunDir) -> None:
    """Raise RunDirError where the script goes on with another directory than this one, of which this is a copy or a later place."""
    found = re.search(r"(?m)^export RUN_DIR=(.*)$", run.resume_script.read_text(encoding="utf-8", errors="replace"))
    if found is None or found[1].startswith("$'"):  # bash's quoting of control characters
        return
    named = Path(*shlex.split(found[1]))
    if not named.exists() or not named.samefile(run.path):
        raise RunDirError(
            f"{run.resume_script} goes on with {named}, of which {run.path} is a copy or a later place; submit it by the command that "
            f"submitted {named}, with --run-dir={run.quoted}, or where it was moved, make {named} a link to it"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
