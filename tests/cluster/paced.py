"""`python -m MODULE …` for jobs in tests: the product as it is, at a pace that leaves time to act, and with real faults.

KIT_PACE_S=0.1          each optimizer step takes that much longer, without using the CPU
KIT_KILL="STEP RANK"    that rank kills itself with SIGKILL before it takes that step; `once` after it: only if no attempt did
KIT_KILL_NODE=n3         with KIT_KILL="STEP RANK": only where that rank runs on this node
KIT_OTHER_DISK="NODE"   ranks on that node have another file system where the others have the run directory
KIT_LINGER_S=20         ranks stay that long after their last step, or until a signal, with everything written
KIT_SIGNALS=FILE        each signal that a rank gets is a line in the file: RANK NUMBER

Files in the run directory do what only somebody who watches the run can ask for:

pace                    SECONDS, instead of KIT_PACE_S as long as the file is there
kill-in-save            RANK FILE FRACTION: once, at its next save, the rank kills itself when it has written that fraction of
                        its `state` or `rank` file of the checkpoint; `killed-in-save` then tells BYTES and PATH
rest-in-save            RANK SECONDS: once, at its next save, the rank rests that long in the middle of its `state` file;
                        `rests-in-save` tells BYTES and PATH meanwhile, and is gone once all is written
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

PACE_S, LINGER_S = (float(os.environ.get(name, "0")) for name in ("KIT_PACE_S", "KIT_LINGER_S"))
KILL = os.environ.get("KIT_KILL", "").split()
if os.environ.get("KIT_KILL_NODE", os.environ.get("SLURMD_NODENAME")) != os.environ.get("SLURMD_NODENAME"):
    KILL = []


def patch_jobs() -> None:
    """Reach the trainer only where it is needed: other modules of the kit start without torch."""
    from gpt2hpc import jobs

    run_attempt = jobs._run_attempt

    def paced(opened: Any, run: Any, ranks: Any, signals: Any, *more: Any) -> None:
        from gpt2hpc.training.trainer import Trainer

        genuine = Trainer.optimizer_step

        def optimizer_step(self: Trainer, stream: Iterator[Any]) -> Any:
            time.sleep(pace_s(self.run_dir.path))
            if KILL and (self.step + 1, self.ranks.rank) == (int(KILL[0]), int(KILL[1])):
                marker = self.run_dir.path / "killed"
                if "once" not in KILL or not marker.exists():
                    marker.touch()
                    self.saves.settle(self.log)  # so that it is known what was saved before
                    os.kill(os.getpid(), signal.SIGKILL)
            return genuine(self, stream)

        Trainer.optimizer_step = optimizer_step  # type: ignore[method-assign]
        run_attempt(opened, run, ranks, signals, *more)
        until = time.monotonic() + LINGER_S
        while time.monotonic() < until and not signals.stop:
            time.sleep(0.1)

    jobs._run_attempt = paced


def pace_s(run: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        return float((run / "pace").read_text())
    return PACE_S


def patch_writes() -> None:
    """Whichever thread writes a checkpoint's file, it may be the last thing that its process does."""
    from gpt2hpc import durable

    genuine = durable.write_bytes

    def write_bytes(path: Path, contents: bytes | memoryview) -> None:
        if path.suffix == ".safetensors" and (order := order_in(path.parents[2] / "kill-in-save")):
            rank, file, fraction = order
            if os.environ["SLURM_PROCID"] == rank and path.name.startswith(f"{file}-"):
                die_writing(path, memoryview(contents), float(fraction))
        if path.name.startswith("state-") and (order := order_in(path.parents[2] / "rest-in-save")):
            rank, seconds = order
            if os.environ["SLURM_PROCID"] == rank:
                rest_writing(path, memoryview(contents), float(seconds))
        genuine(path, contents)

    durable.write_bytes = write_bytes


def order_in(path: Path) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(path.read_text().split())
    return ()


def die_writing(path: Path, contents: memoryview, fraction: float) -> None:
    part = contents[: int(fraction * len(contents))]
    order = path.parents[2] / "kill-in-save"
    write_part(path, part)
    order.unlink()
    order.with_name("killed-in-save").write_text(f"{part.nbytes} {path}")
    os.kill(os.getpid(), signal.SIGKILL)


def rest_writing(path: Path, contents: memoryview, seconds: float) -> None:
    part = contents[: len(contents) // 2]
    order = path.parents[2] / "rest-in-save"
    write_part(path, part)
    order.unlink()
    order.with_name("rests-in-save").write_text(f"{part.nbytes} {path}")
    time.sleep(seconds)
    order.with_name("rests-in-save").unlink()


def write_part(path: Path, part: memoryview) -> None:
    with path.open("wb") as file:
        file.write(part)
        file.flush()
        os.fsync(file.fileno())


def patch_signals(file: str) -> None:
    """A line is one write to the end of the file, so those of all ranks stay whole."""
    from gpt2hpc.cluster.signals import SignalFlag

    genuine = SignalFlag._remember

    def remember(self: SignalFlag, number: int, frame: FrameType | None) -> None:
        with Path(file).open("a") as noted:
            noted.write(f"{os.environ['SLURM_PROCID']} {number}\n")
        genuine(self, number, frame)

    SignalFlag._remember = remember  # type: ignore[method-assign]


def mount_another_disk() -> None:
    """In a mount namespace of this rank's own."""
    os.environ["KIT_OTHER_DISK"] = ""
    shell = (
        f"mount -t tmpfs none {shlex.quote(os.environ['RUN_DIR'])} && exec {shlex.join([sys.executable, *sys.argv])}"
    )
    os.execvp("unshare", ["unshare", "-m", "sh", "-c", shell])


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "-u"]
    assert words[0] == "-m", words
    if words[1] in ("gpt2hpc.train", "submitit.core._submit"):
        if os.environ.get("KIT_OTHER_DISK", "none") == os.environ.get("SLURMD_NODENAME"):
            mount_another_disk()
        patch_jobs()
        patch_writes()
        if file := os.environ.get("KIT_SIGNALS"):
            patch_signals(file)
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
