"""`python -m gpt2hpc.training.wandb_follower RUN_DIR PROJECT`: metrics.jsonl as it grows, to Weights & Biases.

A process of its own, so that its client's threads, prompts, waits and random generators are not the training's. It ends when its
standard input does: with the attempt, however that ends. PROJECT may be ENTITY/PROJECT. The run's identity is W&B's id, so a
resumed run goes on in the same place; without a network or a key it writes to RUN_DIR/wandb, for `wandb sync`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from gpt2hpc import cli, config_io
from gpt2hpc.cluster.signals import SIGNALS
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.writers import values

LOOK_EVERY_S = 1.0
INIT_S = 30
"""How long W&B's server may take to answer before the attempt is kept on disk."""
END_S = 8.0
"""How long the last values may take to get there."""


def main(argv: Sequence[str]) -> int:
    run, project = RunDir(Path(argv[0])), argv[1]
    for number in SIGNALS:  # Slurm sends them to every process of a step
        signal.signal(number, signal.SIG_IGN)
    with run.metrics.open(encoding="utf-8") as file:  # before an attempt to come takes the name
        session = _begun(run, project)
        first = last = session.starting_step  # it has what an earlier attempt sent
        for line in _lines(file):
            facts = json.loads(line)
            if facts["step"] >= first:
                last = max(last, facts["step"])
                session.log(values(facts), step=last)  # a save is told some steps later, and W&B's only grow
    session.finish()
    return 0


def _begun(run: RunDir, project: str) -> Any:
    """W&B's run: the one of earlier attempts where there is a network, one on disk elsewhere."""
    import wandb

    entity, _, name = project.rpartition("/")
    facts: dict[str, Any] = {
        "project": name,
        "entity": entity or None,
        "id": run.identity.read_text(encoding="utf-8").strip(),
        "name": run.name,
        "dir": str(run.path),
        "config": dict(config_io.flat(dataclasses.asdict(config_io.load(run.config)))),
        "settings": wandb.Settings(console="off", silent=True, init_timeout=INIT_S, save_code=False, disable_git=True),
    }
    if os.environ.get("WANDB_MODE", "online") == "online":
        try:
            return wandb.init(**facts, resume="allow")
        except (wandb.errors.Error, OSError) as error:
            reason = " ".join(str(error).split())
            cli.say(f"warning: W&B is not reached, so this attempt is kept in {run.wandb} for `wandb sync`: {reason}")
        return wandb.init(**facts, mode="offline")
    return wandb.init(**facts)


def _lines(file: TextIO) -> Iterator[str]:
    """Whole lines, until standard input has ended and there are no more."""
    torn, ended = "", False
    while True:
        while read := file.readline():
            torn += read
            if torn.endswith("\n"):
                yield torn
                torn = ""
        if ended:
            return
        ended = bool(select.select([sys.stdin], [], [], LOOK_EVERY_S)[0])
        if ended:
            _end_within(END_S)


def _end_within(seconds: float) -> None:
    """End whatever hangs then."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
