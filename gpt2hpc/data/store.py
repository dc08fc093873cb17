"""Where a rank finds its shards: in their directory, or in a cache on the node's own disk that is filled ahead of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Protocol

from gpt2hpc import durable
from gpt2hpc.config import DataConfig
from gpt2hpc.data import hub
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.patience import HubDownError, LateError
from gpt2hpc.data.shards import Shard, Tokens, has_size, open_shard
from gpt2hpc.errors import DataError, is_users

Fetch = Callable[[Shard, Path], None]
"""Puts a shard at a path, whole and verified, or raises."""

_POLL_S = 0.05
_DOWN_S = 10.0
"""Before a Hub that was down through all tries is asked again."""
_ABANDONED_S = 86_400.0
_CACHE = re.compile(r"gpt2hpc-.+-[0-9a-f]{16}")


class Store(Protocol):
    """Shards by what the manifest knows of them."""

    def tokens(self, shard: Shard) -> Tokens:
        """All tokens of a shard, memory-mapped; waits for it if it is on its way."""
        ...

    def keep(self, shards: Sequence[Shard]) -> None:
        """These are needed for ever."""
        ...

    def follow(self, now: Sequence[Shard], then: Iterator[Shard]) -> None:
        """Training has come to `now`; what comes `then` may be fetched, and what is in neither may go."""
        ...

    def room_for(self, shards: Sequence[Shard]) -> None:
        """Raise DataError unless so much may be needed at a time, beside what is kept."""
        ...

    def impatient(self) -> contextlib.AbstractContextManager[None]:
        """A block in which whoever waits for a shard stops waiting: nobody wants it any more."""
        ...

    def close(self) -> None:
        """Fetch no more."""
        ...

    def remove(self) -> None:
        """Delete what was fetched, once no process of the node reads any more."""
        ...


def open_store(
    manifest: Manifest,
    config: DataConfig,
    env: Mapping[str, str],
    *,
    job: str,
    fetches: bool,
    arrived: Callable[[], object] = lambda: None,
) -> Store:
    """The store that the settings ask for; of the ranks that a job has on a node one `fetches`.

    `arrived` is called, in the thread that reads, for each shard that was waited for.
    """
    if not hub.is_remote(manifest.where) and not config.stage:
        return Directory(Path(manifest.where))
    if not hub.is_remote(manifest.where) and any(shard.sha256 is None for shard in manifest.shards):
        raise DataError(
            f"data.stage=true, but {manifest.where} has no hashes to compare copies with; note them with "
            f"`gpt2hpc verify --adopt {manifest.where}`"
        )
    place = cache_directory(config.cache_dir, env)
    if fetches:
        clear_abandoned(place)
    # A job of its own: two that share one would delete each other's shards.
    directory = place / f"gpt2hpc-{job}-{manifest.sha256[:16]}"
    return NodeCache(
        fetch_from(manifest.where),
        directory,
        budget_bytes=round(config.cache_gib * 2**30),
        patience_s=config.patience_s,
        fetches=fetches,
        arrived=arrived,
    )


def cache_directory(chosen: str | None, env: Mapping[str, str]) -> Path:
    """On the node's own disk: what is chosen, else where the job's temporary files go."""
    if chosen is not None:
        expanded = Template(chosen).safe_substitute(env)
        if "$" in expanded:
            raise DataError(f"data.cache_dir={chosen} names a variable that is not set; set it, or name a directory")
        return Path(expanded).expanduser()
    named = [env[name] for name in ("SLURM_TMPDIR", "TMPDIR") if env.get(name)]
    there = [path for path in named if os.access(path, os.W_OK)]  # in a container they may be missing
    return Path(there[0] if there else "/tmp") / f"gpt2hpc-data-{os.getuid()}"


def clear_abandoned(place: Path) -> None:
    """Remove what jobs left that were killed: caches, and nothing else there, in which no process showed itself for a day."""
    for path in place.glob("gpt2hpc-*"):
        if not _CACHE.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path)


def fetch_from(where: str) -> Fetch:
    """How shards come from a directory or a Hub dataset."""
    if hub.is_remote(where):
        dataset = hub.parse(where)
        return lambda shard, target: hub.fetch(dataset, shard.file, target, size=shard.bytes, sha256=shard.sha256)
    return lambda shard, target: _copy(Path(where) / shard.file, shard, target)


def _copy(source: Path, shard: Shard, target: Path) -> None:
    """Copy and hash in one pass."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as file, durable.publishing(target) as copy:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            size += len(chunk)
            copy.write(chunk)
        if size != shard.bytes or (shard.sha256 is not None and digest.hexdigest() != shard.sha256):
            raise DataError(
                f"{source} is damaged: its bytes are not those of the manifest; run `gpt2hpc verify {source.parent}`"
            )


class Directory:
    """Shards where they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: dict[str, Tokens] = {}

    def tokens(self, shard: Shard) -> Tokens:
        if shard.file not in self._open:
            self._open[shard.file] = open_shard(self._path / shard.file, shard)
        return self._open[shard.file]

    def keep(self, shards: Sequence[Shard]) -> None:
        """They are."""

    def follow(self, now: Sequence[Shard], then: Iterator[Shard]) -> None:
        """Nothing comes and nothing goes."""

    def room_for(self, shards: Sequence[Shard]) -> None:
        """There is."""

    def impatient(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self._open.clear()

    def remove(self) -> None:
        """They are the user's."""


class NodeCache:
    """Shards in a directory of this node, never more than `budget_bytes` of them.

    One process of the node fetches, in the order of training, as far ahead as the budget goes, and deletes what training
    has left behind, through any time in which the Hub is down; whoever needs a shard waits for its name to appear, `patience_s`
    seconds at most. Files come and go by rename and
    unlink alone, so what an earlier attempt of the job has fetched serves as well.
    """

    def __init__(
        self,
        fetch: Fetch,
        directory: Path,
        *,
        budget_bytes: int,
        patience_s: float,
        fetches: bool,
        arrived: Callable[[], object] = lambda: None,
    ) -> None:
        self._fetch, self._directory, self._arrived = fetch, directory, arrived
        self._budget_bytes, self._patience_s = budget_bytes, patience_s
        self._open: dict[str, Tokens] = {}
        self._kept: tuple[Shard, ...] = ()
        self._wanted: tuple[Shard, ...] = ()
        self._changed, self._closed = threading.Condition(), False
        self._failure: BaseException | None = None
        self._down: HubDownError | None = None
        self._impatient = False
        self._thread = threading.Thread(target=self._serve, name="fetch", daemon=True) if fetches else None
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not (is_users(error) or isinstance(error, (FileExistsError, NotADirectoryError))):
                raise
            raise DataError(f"data.cache_dir={directory} cannot be made ({error.strerror}); choose another") from None
        if self._thread:
            for path in directory.glob(".*.tmp"):  # of an attempt that was killed: nobody else fetches here
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            self._thread.start()

    def tokens(self, shard: Shard) -> Tokens:
        found = self._open.get(shard.file)
        if found is None:
            found = self._open[shard.file] = self._awaited(shard)
            self._arrived()
        return found

    def _awaited(self, shard: Shard) -> Tokens:
        path, deadline = self._path(shard), time.monotonic() + self._patience_s
        while True:
            if has_size(path, shard):
                with contextlib.suppress(FileNotFoundError):  # it may go again, while another process leads
                    return open_shard(path, shard)
            if self._failure is not None:
                raise self._failure
            if self._impatient:
                raise DataError(f"{path} is no longer waited for")
            if time.monotonic() > deadline:
                why = f" ({self._down.what})" if self._down else ""
                raise LateError(
                    f"{path} did not come within data.patience_s={self._patience_s:g} seconds{why}; raise that, or prepare or copy "
                    "the data where this job can read it"
                )
            time.sleep(_POLL_S)

    def _path(self, shard: Shard) -> Path:
        return self._directory / shard.file.replace("/", "__")

    def keep(self, shards: Sequence[Shard]) -> None:
        self._kept = tuple(shards)
        self.follow((), iter(()))

    def follow(self, now: Sequence[Shard], then: Iterator[Shard]) -> None:
        needed = dict.fromkeys([*self._kept, *now])
        self._check_room(list(needed))
        size = sum(shard.bytes for shard in needed)
        for shard in then:
            size += shard.bytes
            if size > self._budget_bytes or shard in needed:  # the next epoch comes back to what is here
                break
            needed[shard] = None
        names = {shard.file for shard in needed}
        self._open = {name: tokens for name, tokens in dict(self._open).items() if name in names}
        with self._changed:
            self._wanted = tuple(needed)
            self._changed.notify()

    def room_for(self, shards: Sequence[Shard]) -> None:
        self._check_room([*self._kept, *shards])

    def _check_room(self, shards: Sequence[Shard]) -> None:
        size = sum(shard.bytes for shard in shards)
        if size > self._budget_bytes:
            raise DataError(
                f"data.cache_gib={self._budget_bytes / 2**30:.3g} is too small for the {len(shards)} shards that are read at a time, "
                f"{size / 2**30:.3g} GiB; raise it, or lower data.shuffle_shards"
            )

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        self._impatient = True
        try:
            yield
        finally:
            self._impatient = False

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._open.clear()

    def remove(self) -> None:
        if self._thread is not None:
            self.close()
            shutil.rmtree(self._directory, ignore_errors=True)

    # The process that fetches -------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._closed and self._next() is None:
                        os.utime(self._directory)  # somebody lives here
                        self._changed.wait(timeout=1.0)  # and look again: what was here may have been deleted
                    shard = self._next()
                if self._closed:
                    return
                if shard is not None:
                    self._make_room(shard.bytes)
                    self._try(shard)
        except OSError as error:
            told = f"data.cache_dir={self._directory}: {error.strerror}; free space, lower data.cache_gib, or choose another"
            self._failure = DataError(told) if is_users(error) else error
        except BaseException as error:
            self._failure = error

    def _try(self, shard: Shard) -> None:
        """Fetch it, unless the Hub is down, which may pass before anybody needs it."""
        try:
            self._fetch(shard, self._path(shard))
            self._down = None
        except HubDownError as error:
            self._down = error
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=_DOWN_S)

    def _next(self) -> Shard | None:
        """The first wanted shard that is not here."""
        return next((shard for shard in self._wanted if not has_size(self._path(shard), shard)), None)

    def _make_room(self, size: int) -> None:
        """Delete what is not wanted, the oldest first, until `size` bytes more fit the budget."""
        wanted = {self._path(shard) for shard in self._wanted}
        here = []
        for path in self._directory.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):
                here.append((path.stat(), path))
        total = sum(stat.st_size for stat, _ in here)
        for stat, path in sorted(here, key=lambda each: each[0].st_mtime):
            if total + size <= self._budget_bytes:
                return
            if path not in wanted:
                path.unlink(missing_ok=True)
                total -= stat.st_size
