"""Saves beside the training: the steps wait only while the state is copied to host memory.

Each rank copies its share of the state into a buffer that is the image of its safetensors file, and goes on. A thread hashes
the image, writes, fsyncs, reads back and compares; rank 0's then writes the manifest and renames. All of it happens in a
directory `….tmp`, so a checkpoint is complete or absent. One save is under way at a time. The threads of the ranks meet in
a process group of their own, which never meets the training's collectives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from gpt2hpc import durable
from gpt2hpc.errors import RunDirError, as_users
from gpt2hpc.training.checkpoint import FORMAT, MANIFEST, Checkpoint, facts_sha256, file_sha256
from gpt2hpc.training.process_group import Ranks
from gpt2hpc.training.shares import spread

Tensors = Mapping[str, Tensor]
RankState = tuple[Tensors, Mapping[str, str]]

ABANDON_S = 60.0
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the safetensors format."""


@dataclass(frozen=True)
class Saved:
    """A save that was published. `bytes` are those of all ranks, `stall_s` is how long the steps waited for it."""

    checkpoint: Checkpoint
    bytes: int
    seconds: float
    stall_s: float

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9)
        return (
            f"saved step {self.checkpoint.step}: {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s ({rate / 1e6:,.0f} MB/s), "
            f"the steps waited {self.stall_s * 1e3:,.0f} ms: {self.checkpoint.path.name}"
        )


@dataclass(frozen=True)
class Order:
    """What to save, beside the state, and under which name.

    Args:
        target: The checkpoint's directory.
        rank_state: What belongs to this rank alone.
        facts: For the manifest.
        texts: Further files, by name; asked for on rank 0, in the thread.
        published: Called on rank 0, in the thread, once the checkpoint is there.
    """

    target: Path
    rank_state: RankState
    facts: Mapping[str, Any]
    texts: Callable[[], Mapping[str, bytes]] = dict
    published: Callable[[Checkpoint], None] = lambda checkpoint: None


class Saver:
    """Every rank has one, and calls it at the same steps.

    Args:
        ranks: This process among its peers.
        attempt: Number of the attempt; keeps a zombie's files apart.
        fence: Raises, on rank 0, if this attempt may not publish.
        all_have_all: Whether each rank is given the whole state, of which it writes a share, or just what it alone writes.
    """

    def __init__(self, ranks: Ranks, *, attempt: int, fence: Callable[[], None], all_have_all: bool = True) -> None:
        self._ranks, self._attempt, self._fence = ranks.apart(), attempt, fence
        self._all_have_all = all_have_all
        self._image: FileImage | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Saved | None = None

    def prepare(self, state: Tensors) -> None:
        """Make room for this rank's share, beside the steps: new memory is slow to write to the first time."""
        share = self._share(state)
        if self._thread is None and (self._image is None or not self._image.fits(share)):
            self._run(lambda: self._make_room(share))

    def begin(self, state: Tensors, order: Order, *, waited_s: float = 0.0) -> None:
        """Copy this rank's share of `state` and return; waits for the save before it, if that is under way.

        `waited_s` is how long the steps have waited for this save already.
        """
        began = time.perf_counter()
        self.wait()
        share = self._share(state)
        if self._image is None or not self._image.fits(share):
            self._make_room(share)
        assert self._image is not None
        self._image.fill(share)
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        stall_s = waited_s + time.perf_counter() - began
        self._run(lambda: self._save(order, began, stall_s))

    @property
    def is_saving(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def finished(self) -> Saved | None:
        """What was published since the last call; on rank 0."""
        if self.is_saving:
            return None
        saved, self._saved = self._saved, None
        return saved

    def wait(self) -> None:
        """Until nothing is under way. Raises what went wrong, on every rank alike.

        RunDirError where the disk is full or read-only; what was there before stays.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """After an error: give what is under way the time to end, or to see that a peer is gone."""
        if self._thread is not None:
            self._thread.join(ABANDON_S)

    def _run(self, work: Callable[[], None]) -> None:
        def caught() -> None:
            try:
                self._ranks.use_device()
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=caught, name="saver", daemon=True)
        self._thread.start()

    def _share(self, state: Tensors) -> Tensors:
        if not self._all_have_all:
            return {name: tensor.detach() for name, tensor in state.items()}
        owners = spread({name: tensor.nbytes for name, tensor in state.items()}, self._ranks.world_size)
        return {name: tensor.detach() for name, tensor in state.items() if owners[name] == self._ranks.rank}

    def _make_room(self, share: Tensors) -> None:
        self._image = None  # the old one first: two may not fit
        self._image = FileImage(share, pinned=self._ranks.device.type == "cuda")

    def _save(self, order: Order, began: float, stall_s: float) -> None:
        """Write and publish, in the thread."""
        ranks, target = self._ranks, order.target
        temporary = target.with_name(f"{target.name}.{self._attempt:04d}.tmp")
        with ranks.first_decides(), _disk_errors(target):
            if ranks.is_first:
                self._fence()
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        files = self._write_together(temporary, order)
        with ranks.first_decides(), _disk_errors(target):
            if ranks.is_first:
                facts = {"format": FORMAT, **order.facts, "files": files}
                durable.publish_json(temporary / MANIFEST, {**facts, "sha256": facts_sha256(facts)})
                self._fence()
                if target.exists():  # damaged, or it would not be written again
                    shutil.rmtree(target)
                temporary.rename(target)
                durable.fsync_dir(target.parent)
                seconds = time.perf_counter() - began
        with ranks.first_decides():
            if ranks.is_first:
                written = sum(entry["bytes"] for entry in files.values())
                self._saved = Saved(Checkpoint(target), written, seconds, stall_s)
                try:
                    order.published(Checkpoint(target))
                except OSError as error:
                    raise RunDirError(
                        f"{target.name} is saved, but what is noted of it could not be written: {as_users(error)}"
                    ) from error

    def _write_together(self, temporary: Path, order: Order) -> dict[str, dict[str, Any]]:
        """Every rank writes its share; an error of one is the error of all. Returns the files of all ranks."""
        written: dict[str, dict[str, Any]] = {}
        caught: RunDirError | OSError | None = None
        try:
            with _disk_errors(order.target):
                written = {path.name: _written(path, contents) for path, contents in self._files(temporary, order)}
        except (RunDirError, OSError) as error:
            caught = error
        results = self._ranks.gather((written, str(caught) if caught else None, isinstance(caught, RunDirError)))
        for _, message, is_users in results:
            if message:
                raise (RunDirError if is_users else OSError)(message) from caught
        return {name: entry for part, _, _ in results for name, entry in part.items()}

    def _files(self, directory: Path, order: Order) -> Iterator[tuple[Path, bytes | memoryview]]:
        """What this rank writes."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        assert self._image is not None
        yield directory / f"state-{rank:05d}-of-{world_size:05d}.safetensors", self._image.contents
        tensors, texts = order.rank_state
        # one key only: safetensors writes several in random order, and equal states should be equal bytes
        metadata = {"texts": json.dumps(dict(texts), sort_keys=True)}
        yield directory / f"rank-{rank:05d}.safetensors", safetensors.torch.save(dict(tensors), metadata=metadata)
        if self._ranks.is_first:
            yield from ((directory / name, contents) for name, contents in order.texts().items())


class FileImage:
    """A safetensors file in memory, to copy tensors into: 8 bytes of the header's length, the JSON header, the tensors.

    The same tensors always give the same bytes. Pinned, so that a GPU copies at the bus's speed.
    """

    def __init__(self, tensors: Tensors, *, pinned: bool) -> None:
        self._layout, end = _layout_of(tensors), 0
        header: dict[str, dict[str, Any]] = {}
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # so that each is aligned
            tensor, begin = tensors[name], end
            end += tensor.nbytes
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._buffer = torch.empty(start + end, dtype=torch.uint8, pin_memory=pinned)
        self._buffer.zero_()  # touches every page
        self._buffer[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._views = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            part = self._buffer[start + first : start + last]
            self._views[name] = part.view(tensors[name].dtype).view(tensors[name].shape)

    def fits(self, tensors: Tensors) -> bool:
        return self._layout == _layout_of(tensors)

    @torch.no_grad()
    def fill(self, tensors: Tensors) -> None:
        """Copy; on CUDA it is only begun."""
        for name, view in self._views.items():
            view.copy_(tensors[name], non_blocking=self._buffer.is_pinned())

    @property
    def contents(self) -> memoryview:
        return memoryview(cast("Any", self._buffer.numpy()))


def _layout_of(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _written(path: Path, contents: bytes | memoryview) -> dict[str, Any]:
    """Write and compare with what is read back, so that pruning after it needs no further look; returns size and sha256."""
    digest = hashlib.sha256(contents).hexdigest()
    durable.write_bytes(path, contents)
    if file_sha256(path) != digest:
        raise OSError(f"{path.name} reads back differently than it was written")
    return {"bytes": len(contents), "sha256": digest}


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error of the user's; any other one may pass, so it stays a crash."""
    try:
        yield
    except OSError as error:
        raise RunDirError(f"checkpoint {target} could not be written: {as_users(error)}") from error
