"""Checkpoints in a model repository of the Hugging Face Hub: listed, uploaded in one commit each, fetched and verified.

    checkpoints/20260131-120000_gpt2-124m-ctx1024_step0001000/      the files of the directory, as they are
        manifest.json                                               without it a folder is none of ours

A commit is there in full or not at all, as a directory is. A hash that the Hub states of a file is compared with the manifest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2hpc import durable
from gpt2hpc.config import CheckpointConfig
from gpt2hpc.data import hub
from gpt2hpc.data.hub import HubFile, Repository
from gpt2hpc.data.patience import HubDownError, WrongBytesError, asked
from gpt2hpc.errors import ConfigError, DataError
from gpt2hpc.training import checkpoint
from gpt2hpc.training.checkpoint import MANIFEST, Checkpoint, file_sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FOLDER = "checkpoints"
SCHEME = "hf://"
PUSH = "push it with `gpt2hpc sync RUN`"
PULL = "fetch it with `gpt2hpc sync RUN --pull`"
PARTIAL = ".hub.tmp"
"""Ending of a directory that is being fetched."""

Say = Callable[[str], None]
Accept = Callable[[Checkpoint], None]


class OfAnotherRunError(Exception):
    """What `accept` raises to have a checkpoint passed over."""


def accept_any(found: Checkpoint) -> None:
    """Raises nothing."""


@dataclass(frozen=True)
class Wanted:
    """What `hf://USER/NAME[@STEP]` means; without a step the furthest."""

    repo: str
    step: int | None = None


@dataclass(frozen=True)
class Remote:
    """A checkpoint in a repository at the commit `revision`; its files by their name in it."""

    repo: str
    revision: str
    name: str
    files: Mapping[str, HubFile]

    @property
    def step(self) -> int:
        return Checkpoint(Path(self.name)).step

    @property
    def run(self) -> str:
        """When its run began, and the model's tag: `20260131-120000_gpt2-124m-ctx1024`."""
        return run_of(self.name)

    @property
    def tag(self) -> str:
        return self.run.partition("_")[2]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class Contents:
    """What a repository holds at a commit; `checkpoints` the furthest first, `folders` by every name below FOLDER."""

    revision: str
    checkpoints: tuple[Remote, ...]
    folders: Mapping[str, Mapping[str, HubFile]]


def run_of(name: str) -> str:
    return name.rpartition("_step")[0]


def discarded(names: Iterable[str], *, by: str, config: CheckpointConfig) -> list[str]:
    """Which of `names` go when `by` comes: what the run directory would not keep of the same run, and never itself."""
    steps = {name: Checkpoint(Path(name)).step for name in {*names, by} if run_of(name) == run_of(by)}
    unneeded = checkpoint.outdated(set(steps.values()), config)
    return sorted(name for name, step in steps.items() if step in unneeded and name != by)


def is_remote(where: str) -> bool:
    return where.startswith(SCHEME)


def parse(where: str) -> Wanted:
    """`hf://USER/NAME` or `hf://USER/NAME@STEP`; ConfigError for anything else."""
    repo, at, step = where.removeprefix(SCHEME).partition("@")
    if not is_remote(where) or not hub.is_name(repo) or (at and not step.isdecimal()):
        raise ConfigError(f"{where} names no checkpoint on the Hub; write hf://USER/NAME, or hf://USER/NAME@STEP")
    return Wanted(repo, int(step) if at else None)


def remote(repo: str) -> tuple[Remote, ...]:
    """The checkpoints in a model repository, the furthest first; DataError where it is missing, HubDownError without a Hub."""
    return asked(f"{SCHEME}{repo}", lambda api: _contents(api, repo), elsewhere=PULL).checkpoints


def _contents(api: HfApi, repo: str) -> Contents:
    """As of one commit."""
    revision = str(api.repo_info(repo).sha)
    folders: dict[str, dict[str, HubFile]] = {}
    for entry in api.list_repo_tree(repo, recursive=True, revision=revision):
        top, _, rest = entry.path.partition("/")
        name, _, inside = rest.partition("/")
        if hasattr(entry, "size") and top == FOLDER and inside and Checkpoint(Path(name)).step >= 0:
            folders.setdefault(name, {})[inside] = hub.described(entry)
    found = [Remote(repo, revision, name, _known(files)) for name, files in folders.items() if MANIFEST in files]
    found.sort(key=lambda each: (each.step, each.name), reverse=True)
    return Contents(revision, tuple(found), folders)


def _known(files: Mapping[str, HubFile]) -> dict[str, HubFile]:
    """Those that a checkpoint may have; a path that leads elsewhere is none of them."""
    return {name: file for name, file in files.items() if name == MANIFEST or checkpoint.is_file_name(name)}


# Up -----------------------------------------------------------------------------------------------------------------


def push(local: Checkpoint, repo: str, config: CheckpointConfig) -> str:
    """Upload a checkpoint, and discard those that it replaces, in one commit; returns the commit that has it.

    Asked again from the start after any failure, so that a commit whose answer was lost, or that another process made, is found
    instead of made twice. The commit is refused if the branch has moved since it was looked at.

    Raises DataError if it is refused, ConfigError if another run has its name, HubDownError if the Hub does not answer,
    FileNotFoundError if the checkpoint goes.
    """
    expected = _expected(local)

    def attempt(api: HfApi) -> str:
        before = _contents(api, repo)
        if not _differing(expected, before.folders.get(local.path.name, {})):
            return before.revision
        _refuse_another_run(api, local, before)
        commit = api.create_commit(
            repo,
            _operations(local, expected, before, config),
            commit_message=f"Step {local.step:,}: {local.path.name}",
            parent_commit=before.revision,
        )
        after = _contents(api, repo)
        if differing := _differing(expected, after.folders.get(local.path.name, {})):
            raise WrongBytesError(f"{differing[0]} did not arrive as it is here")
        return str(commit.oid)

    with hub.quiet():
        return asked(f"{SCHEME}{repo}", attempt, what=local.path.name, elsewhere=PUSH)


def _refuse_another_run(api: HfApi, local: Checkpoint, before: Contents) -> None:
    """Raise ConfigError where another run, begun in the same second, has the names that this one's checkpoints have."""
    same = [each for each in before.checkpoints if each.run == run_of(local.path.name)]
    if not same:
        return
    with tempfile.TemporaryDirectory(prefix="gpt2hpc-") as there:
        path = f"{FOLDER}/{same[0].name}/{MANIFEST}"
        api.hf_hub_download(same[0].repo, path, revision=before.revision, local_dir=there)
        theirs = Checkpoint(Path(there) / FOLDER / same[0].name).manifest().get("run")
    ours = local.manifest().get("run")
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"{SCHEME}{same[0].repo} holds checkpoints of another run that began in the same second, {same[0].run}; give each run a "
            "--checkpoint.repo of its own"
        )


def _expected(local: Checkpoint) -> dict[str, HubFile]:
    """Its files as the Hub should describe them. The manifest, which is small, is the one whose sha256 it cannot hold."""
    sha256s = {name: str(entry["sha256"]) for name, entry in local.manifest()["files"].items()}
    sha256s[MANIFEST] = file_sha256(local.path / MANIFEST)
    return {name: hub.file_here(local.path / name, sha256) for name, sha256 in sha256s.items()}


def _differing(expected: Mapping[str, HubFile], there: Mapping[str, HubFile]) -> list[str]:
    """The files that are not there as they should be, or should not be there."""
    same = {name for name, file in expected.items() if name in there and there[name].is_same_as(file)}
    return sorted({*expected, *there} - same)


def _operations(
    local: Checkpoint, expected: Mapping[str, Any], before: Contents, config: CheckpointConfig
) -> list[Any]:
    """What the commit does: this checkpoint comes, with it goes what it replaces."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    place, own = f"{FOLDER}/{local.path.name}", before.folders.get(local.path.name, {})
    outdated = discarded((each.name for each in before.checkpoints), by=local.path.name, config=config)
    return [
        *(CommitOperationAdd(f"{place}/{name}", local.path / name) for name in sorted(expected)),
        *(CommitOperationDelete(f"{place}/{name}") for name in sorted(set(own) - set(expected))),
        *(CommitOperationDelete(f"{FOLDER}/{name}/", is_folder=True) for name in outdated),
    ]


# Down ---------------------------------------------------------------------------------------------------------------


def choose(wanted: Wanted) -> Remote:
    """The checkpoint that is meant; DataError, naming what there is, where there is none."""
    found = remote(wanted.repo)
    chosen = [each for each in found if wanted.step in (None, each.step)]
    if not chosen:
        steps = ", ".join(f"{each.step}" for each in found[:10])
        has = f"has the steps {steps}" if found else "has none"
        step = "a checkpoint" if wanted.step is None else f"a checkpoint of step {wanted.step}"
        raise DataError(f"{SCHEME}{wanted.repo} is to give {step}, but {has}; choose another with hf://USER/NAME@STEP")
    return chosen[0]


def fetch_furthest(
    candidates: Iterable[Remote],
    directory: Path,
    *,
    beyond: Checkpoint | None,
    say: Say,
    accept: Accept = accept_any,
) -> Checkpoint | None:
    """The furthest of `candidates` (the furthest first), fetched into `directory`; None if there is none `beyond` the one given.

    Of the same run as that one; without one, of any that `accept` takes. What does not arrive as its manifest says is skipped aloud.
    Raises DataError if nothing is left of what there was, and none is here to go on from.
    """
    skipped = 0
    for candidate in candidates:
        if beyond is not None and (candidate.step <= beyond.step or candidate.run != run_of(beyond.path.name)):
            continue
        try:
            return fetch(candidate, directory, accept=accept)
        except OfAnotherRunError:
            continue
        except HubDownError:
            raise
        except DataError as error:
            say(f"skipping the checkpoint {SCHEME}{candidate.repo}/{FOLDER}/{candidate.name}: {error}")
            skipped += 1
    if skipped and beyond is None:
        raise DataError(
            f"the Hub has {skipped} checkpoints to go on from, and none came whole; try again later, or begin anew with --resume none"
        )
    return None


def fetch(wanted: Remote, directory: Path, *, accept: Accept = accept_any) -> Checkpoint:
    """Download a checkpoint into `directory`, where it appears whole and verified, or not at all; one that is here is not fetched.

    `accept` may raise once its manifest is here. What an interrupted fetch left in `NAME.hub.tmp` is hashed and used. Raises
    DataError, or HubDownError.
    """
    target = Checkpoint(directory / wanted.name)
    if target.path.exists() and target.damage() is None:
        return target
    partial = Checkpoint(directory / f"{wanted.name}{PARTIAL}")
    partial.path.mkdir(parents=True, exist_ok=True)
    _fetch_file(wanted, MANIFEST, partial.path)
    facts = partial.manifest()
    if facts and facts.get("format") != checkpoint.FORMAT:
        raise DataError(f"format {facts.get('format')}, this version reads {checkpoint.FORMAT}")
    if facts:
        accept(partial)
    _fetch_files(wanted, partial.path)
    if damage := partial.damage():
        shutil.rmtree(partial.path)
        raise DataError(f"what came is damaged: {damage}")
    if target.path.exists():
        shutil.rmtree(target.path)
    durable.fsync_dir(partial.path)
    partial.path.rename(target.path)
    durable.fsync_dir(directory)
    return target


def _fetch_files(wanted: Remote, partial: Path) -> None:
    """Those that are not in `partial` yet; what the manifest does not name is neither fetched nor left there."""
    named = {MANIFEST, *Checkpoint(partial).manifest().get("files", ())}
    for name in sorted(named & set(wanted.files)):
        _fetch_file(wanted, name, partial)
    for path in partial.iterdir():
        if path.name not in named:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _fetch_file(wanted: Remote, name: str, partial: Path) -> None:
    file, target = wanted.files[name], partial / name
    if target.is_file() and hub.file_here(target).is_same_as(file):
        return
    source, path = Repository(wanted.repo, wanted.revision, "model"), f"{FOLDER}/{wanted.name}/{name}"
    blob_id = None if file.sha256 else file.blob_id
    hub.fetch(source, path, target, size=file.bytes, sha256=file.sha256, blob_id=blob_id, elsewhere=PULL)
