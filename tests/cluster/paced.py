"""`python -m MODULE …` for jobs in tests: the product as it is, at a pace that leaves time to act, and with real faults.

KIT_PACE_S=0.1          each optimizer step takes that much longer, without using the CPU
KIT_KILL="STEP RANK"    that rank kills itself with SIGKILL before it takes that step; `once` after it: only if no attempt did
KIT_KILL_NODE=n3         with KIT_KILL="STEP RANK": only where that rank runs on this node
KIT_LINGER_S=20         ranks stay that long after their last step, or until a signal, with everything written

Two files in the run directory do what only somebody who watches the run can ask for:

pace                    SECONDS, instead of KIT_PACE_S as long as the file is there
kill-in-save            RANK FILE FRACTION: once, at its next save, the rank kills itself when it has written that fraction of
                        its `state` or `rank` file of the checkpoint; `killed-in-save` then tells BYTES and PATH
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
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

    def paced(opened: Any, run: Any, ranks: Any, signals: Any) -> None:
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
        run_attempt(opened, run, ranks, signals)
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
        if path.suffix == ".safetensors" and (order := kill_order(path.parents[2] / "kill-in-save")):
            rank, file, fraction = order
            if os.environ["SLURM_PROCID"] == rank and path.name.startswith(f"{file}-"):
                die_writing(path, memoryview(contents), float(fraction))
        genuine(path, contents)

    durable.write_bytes = write_bytes


def kill_order(path: Path) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(path.read_text().split())
    return ()


def die_writing(path: Path, contents: memoryview, fraction: float) -> None:
    part = contents[: int(fraction * len(contents))]
    order = path.parents[2] / "kill-in-save"
    with path.open("wb") as file:
        file.write(part)
        file.flush()
        os.fsync(file.fileno())
    order.unlink()
    order.with_name("killed-in-save").write_text(f"{part.nbytes} {path}")
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "-u"]
    assert words[0] == "-m", words
    if words[1] in ("gpt2hpc.train", "submitit.core._submit"):
        patch_jobs()
        patch_writes()
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
