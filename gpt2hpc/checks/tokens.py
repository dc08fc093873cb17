"""The tokenizer and the data: the files that are shipped or prepared, and whether they are what they should be."""

from __future__ import annotations

import dataclasses
from importlib import metadata

from gpt2hpc.checks.scene import Scene
from gpt2hpc.errors import Gpt2hpcError
from gpt2hpc.finding import Finding, missing, ok

SAMPLE = "Hello, world! It's 3 o'clock.\n\nGrüße, 世界 🙂"


def look(scene: Scene) -> list[Finding]:
    return [_tokenizer(), *_data(scene)]


def _tokenizer() -> Finding:
    from gpt2hpc.data import tokenizer

    try:
        encoding = tokenizer.gpt2()
    except (Gpt2hpcError, OSError) as error:
        return missing("tokenizer", " ".join(str(error).split()))
    there = encoding.encode(SAMPLE)
    if tokenizer.decode(there) != SAMPLE:
        return missing("tokenizer", "a text comes back changed; reinstall gpt2hpc and tiktoken")
    try:
        fast = f"gigatoken {metadata.version('gigatoken')}"
    except metadata.PackageNotFoundError:
        fast = "no gigatoken, which would be faster to prepare with: pip install 'gpt2hpc[fast]'"
    text = f"GPT-2's ranks are those published, {len(there)} tokens there and back; tiktoken {metadata.version('tiktoken')}, {fast}"
    return ok("tokenizer", text)


def _data(scene: Scene) -> list[Finding]:
    """Prepared data that was named, as a start looks at it; on the Hub it is not asked for here."""
    if scene.data is None:
        return []
    if scene.data.startswith("hf://"):
        return [ok("data", f"{scene.data}, on the Hub: every start asks for it")]
    from gpt2hpc import starting
    from gpt2hpc.data import catalog

    data = dataclasses.replace(scene.config.data, dir=scene.data)
    try:
        manifest = catalog.load(scene.data)
        starting.check_data(scene.run, dataclasses.replace(scene.config, data=data), manifest)
    except (Gpt2hpcError, OSError) as error:
        return [missing("data", " ".join(str(error).split()))]
    train, val = manifest.tokens("train"), manifest.tokens("val")
    text = f"{scene.data}: {train:,} tokens to train on, {val:,} to validate; `gpt2hpc verify {scene.data}` hashes them"
    return [ok("data", text)]
