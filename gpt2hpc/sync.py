"""`gpt2hpc sync RUN`: upload the checkpoints of a run that wait to go to the Hub, or fetch the furthest one from there.

A training with `checkpoint.repo` starts it by itself after each save; where compute nodes have no internet, run it on a login
node. Two uploads at once do no harm, nor does one beside the training. The exit codes are in docs/hub.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli, config_io
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import CheckpointConfig, Config
from gpt2hpc.data import hub
from gpt2hpc.data.patience import HubDownError
from gpt2hpc.errors import ConfigError, DataError, Gpt2hpcError, MissingError, RunDirError, StoppedError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, hub_checkpoints, resume, uploads
from gpt2hpc.training.checkpoint import Checkpoint
from gpt2hpc.training.hub_access import access


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc sync",
        description="Upload the checkpoints of a run that wait to go to the Hub, the furthest first.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument(
        "--repo",
        metavar="USER/NAME",
        help="model repository (default: checkpoint.repo of the run); created, private, if missing",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what waits, and ask nobody")
    parser.add_argument(
        "--pull",
        action="store_true",
        help="fetch the furthest checkpoint, if it is further than those here; RUN may be new",
    )
    cli.add_examples(
        parser,
        "gpt2hpc sync runs/mine                  # upload what waits",
        "gpt2hpc sync runs/mine --pull           # fetch the furthest checkpoint",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # of Slurm, for the training beside it
        signal.signal(number, signal.SIG_IGN)
    run = RunDir(arguments.run_dir)
    if not arguments.pull and not run.checkpoints.is_dir():
        raise RunDirError(f"{run.path} is no run directory: it has no {run.checkpoints.name}; fetch them with --pull")
    config = config_io.load(run.config) if run.config.exists() else None
    repo = _repository(run, config, arguments.repo)
    if arguments.dry_run:
        return _list(run, repo)
    if arguments.pull:
        pull(run, repo)
    else:
        _push(run, repo, config.checkpoint if config else None)
    return 0


def _repository(run: RunDir, config: Config | None, named: str | None) -> str:
    repo = named or (config.checkpoint.repo if config else None)
    if repo is None:
        why = "has no checkpoint.repo" if config else "holds no config.yaml"
        raise ConfigError(f"{run.path} {why}, so name the repository with --repo USER/NAME")
    if not hub.is_name(repo):
        raise ConfigError(f"--repo={repo} is no model repository; write USER/NAME")
    return repo


def _list(run: RunDir, repo: str) -> int:
    for found in uploads.waiting(run, repo):
        cli.say(f"{found.path.name}  {_bytes(found):,} bytes")
    cli.say(f"hf://{repo}: {uploads.lag(run, repo).line or 'nothing to upload'}")
    return 0


# Up -----------------------------------------------------------------------------------------------------------------


def _push(run: RunDir, repo: str, settings: CheckpointConfig | None) -> None:
    """Upload all that waits; what stops it is kept for `gpt2hpc status`, too."""
    if not uploads.waiting(run, repo) and not uploads.unreadable(run):
        uploads.succeed(run)
        cli.say(f"hf://{repo}: {uploads.lag(run, repo).line or 'nothing to upload'}")
        return
    try:
        push_waiting(run, repo, settings)
    except Gpt2hpcError as error:
        uploads.fail(run, error.line)
        raise
    uploads.succeed(run)
    cli.say(f"hf://{repo}: nothing waits any more")


def push_waiting(run: RunDir, repo: str, settings: CheckpointConfig | None) -> None:
    """Upload what waits, the furthest first, and what is published meanwhile; a damaged one is skipped aloud.

    Raises StoppedError if the Hub is not reached, MissingError if it refuses, DataError if something damaged is left.
    """
    if unreached := access(repo, create=True):
        raise StoppedError(f"hf://{repo}: {unreached.text}; what waits is kept, and the same command uploads it")
    damaged = {found.path for found in uploads.unreadable(run)}
    for path in sorted(damaged):
        cli.warn(f"skipping the damaged checkpoint {path}: its manifest is missing or damaged")
    while waits := [found for found in uploads.waiting(run, repo) if found.path not in damaged]:
        if damage := _push_one(run, waits[0], repo, settings):
            cli.warn(f"skipping the damaged checkpoint {waits[0].path}: {damage}")
            damaged.add(waits[0].path)
    if damaged:
        raise DataError(
            f"{cli.plural(len(damaged), 'damaged checkpoint')} in {run.checkpoints} cannot be uploaded; delete what is of no use"
        )


def _push_one(run: RunDir, found: Checkpoint, repo: str, settings: CheckpointConfig | None) -> str | None:
    """Upload and mark one; returns what is wrong with it, if something is."""
    with uploads.lease(run, found):
        try:
            damage = found.damage()
            if damage and found.path.exists():
                return damage
            cli.say(f"uploading step {found.step}: {found.path.name}, {_bytes(found) / 1e6:,.1f} MB")
            began = time.monotonic()
            sha256 = found.manifest()["sha256"]
            commit = hub_checkpoints.push(found, repo, settings or _settings_of(found))
            seconds = time.monotonic() - began
            uploads.mark(run, found, repo=repo, commit=commit, manifest_sha256=sha256, seconds=seconds)
            cli.say(f"step {found.step} is on hf://{repo} since commit {commit[:12]}; {seconds:.1f} s")
        except (FileNotFoundError, KeyError, ValueError):  # the last is the client's of a file that is gone
            if found.path.exists():
                raise
            cli.say(f"step {found.step} was removed meanwhile, as the run's retention wants it")
        except HubDownError as error:
            raise StoppedError(error.line) from error
        except DataError as error:
            raise MissingError(error.line) from error
    return None


def _settings_of(found: Checkpoint) -> CheckpointConfig:
    """What the run that saved it keeps, where its config.yaml is not there to tell."""
    known = {field.name for field in dataclasses.fields(CheckpointConfig)}
    told = found.manifest().get("config", {}).get("checkpoint", {})
    return CheckpointConfig(**{key: value for key, value in told.items() if key in known})


def _bytes(found: Checkpoint) -> int:
    return sum(entry["bytes"] for entry in found.manifest().get("files", {}).values())


# Down ---------------------------------------------------------------------------------------------------------------


def pull(run: RunDir, repo: str) -> None:
    """Fetch the furthest checkpoint if it is further than the newest whole one here; refused while an attempt lives."""
    Ledger(run).refuse_if_taken("sync", 0)
    here = checkpoint.newest_valid(run.checkpoints, cli.warn)
    skipped: list[str] = []

    def skip(text: str) -> None:
        skipped.append(text)
        cli.warn(text)

    try:
        candidates = hub_checkpoints.remote(repo)
        fetched = hub_checkpoints.fetch_furthest(
            candidates, run.checkpoints, beyond=here, say=skip, accept=resume.same_run(run)
        )
    except HubDownError as error:
        raise StoppedError(error.line) from error
    if fetched is not None:
        resume.adopt(run, fetched)
        cli.say(f"step {fetched.step} is here, as the Hub has it: {fetched.path}")
    elif skipped:
        raise DataError(f"nothing of hf://{repo} that is further than what is here came whole; see the warnings")
    else:
        cli.say(f"hf://{repo} has no checkpoint that is further than " + (f"step {here.step}" if here else "nothing"))


if __name__ == "__main__":
    sys.exit(cli.run(main))
