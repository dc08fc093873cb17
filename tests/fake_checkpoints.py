"""Checkpoints of a few bytes that verify, without torch: for tests of what is done with whole directories."""

from __future__ import annotations

import hashlib
import random

from gpt2hpc import durable
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint
from gpt2hpc.training.checkpoint import Checkpoint

STARTED, TAG = "20260131-120000", "gpt2-tiny-ctx16"


def write_checkpoint(
    run: RunDir, step: int, *, seed: int = 0, started: str = STARTED, size: int = 20_000, identity: str | None = None
) -> Checkpoint:
    """Two files for large-file storage, one ordinary one, and the manifest."""
    path = run.checkpoints / checkpoint.name(started=started, tag=TAG, step=step)
    path.mkdir(parents=True, exist_ok=True)
    source = random.Random(f"{step} {seed}")
    contents = {f"state-{rank:05d}-of-00002.safetensors": source.randbytes(size) for rank in range(2)}
    contents["metrics.jsonl"] = b'{"step": %d}\n' % step
    files = {}
    for name, data in contents.items():
        (path / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    facts = {"format": checkpoint.FORMAT, "step": step, "files": files, **({"run": identity} if identity else {})}
    durable.publish_json(path / checkpoint.MANIFEST, {**facts, "sha256": checkpoint.facts_sha256(facts)})
    return Checkpoint(path)
