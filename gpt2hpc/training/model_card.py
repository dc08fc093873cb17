"""README.md of an exported model: what it is, how it was trained, as far as checkpoint and run tell, and how it is used."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from gpt2hpc import __version__, config_io, durable
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import manifest
from gpt2hpc.data.hub_commit import OURS
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.checkpoint import Checkpoint

_LEFT_OUT = ("data.", "checkpoint.", "requeue.", "train.device", "train.trace_data", "train.log_every")
"""Settings that say where and how often, not what was trained."""


def model_card(found: Checkpoint, model: ModelConfig, *, name: str, has_tokenizer: bool, licence: str | None) -> str:
    """The card of the model in `found`; `name` is what `from_pretrained` is to be given."""
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]"]
    rows = [f"| {key} | {value} |" for key, value in facts(found).items()]
    settings = [f"{key}: {json.dumps(value)}" for key, value in _settings(found).items()]
    return "\n".join(
        [
            "---",
            *([f"license: {licence}"] if licence else []),
            *header,
            "---",
            f"# {model.tag} at step {found.step:,}",
            "",
            f"GPT-2 with {model.parameters:,} parameters and a context of {model.block_size:,} tokens; {OURS} {__version__}.",
            "",
            "```python",
            *_usage(name, has_tokenizer=has_tokenizer),
            "```",
            "",
            *_about_tokens(model, has_tokenizer=has_tokenizer),
            "",
            "## Training",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            "## Settings",
            "",
            "```yaml",
            *settings,
            "```",
            "",
        ]
    )


def _usage(name: str, *, has_tokenizer: bool) -> list[str]:
    if not has_tokenizer:
        return ["from transformers import GPT2LMHeadModel", "", f'model = GPT2LMHeadModel.from_pretrained("{name}")']
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "# as in training, where a document follows the end of another",
        'tokens = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50, do_sample=True, top_k=50)[0]))",
    ]


def _about_tokens(model: ModelConfig, *, has_tokenizer: bool) -> list[str]:
    if has_tokenizer:
        return [
            "The tokenizer is GPT-2's. It reads `<|endoftext|>` in a text as the end of a document; in the training text it was text."
        ]
    return [
        f"There is no tokenizer: the vocabulary of {model.vocab_size:,} is not GPT-2's, and the run does not know it."
    ]


def facts(found: Checkpoint) -> dict[str, str]:
    """What is known of the training, in the order of the card."""
    told = found.manifest()
    config, data = told["config"], told["data"]
    run = RunDir(found.path.parent.parent)
    attempts = len(Ledger(run).attempts())
    losses = _losses(run, found.step)
    tokens, versions = data["samples_consumed"] * data["block_size"], told["versions"]
    rows = {
        "steps": f"{found.step:,}",
        "tokens": f"{tokens:,} (epoch {data['epoch'] + 1})",
        "last training loss": losses.get("loss"),
        "last validation loss": losses.get("val_loss"),
        "began from": config["train"].get("init"),
        "data": _sources(config["data"]["dir"], data["manifest_sha256"]),
        "data manifest (sha256)": f"`{data['manifest_sha256']}`",
        "processes at the end": f"{told['world_size']}",
        "attempts": f"{attempts:,}" if attempts else None,
        "checkpoint": f"`{found.path.name}`",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {key: value for key, value in rows.items() if value is not None}


def _losses(run: RunDir, step: int) -> dict[str, str]:
    """The last losses up to that step, in nats, with the step that each is of."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["step"] <= step:
                    values = {key: entry[key] for key in ("loss", "val_loss") if entry.get(key) is not None}
                    found |= {key: f"{value:.4f} (step {entry['step']:,})" for key, value in values.items()}
    return found


def _sources(where: str, sha256: str) -> str:
    """What the data was made from, if it still lies where it was; else its place."""
    told: Any = durable.read_json(Path(where) / manifest.NAME)
    if not isinstance(told, dict) or told.get("sha256") != sha256:
        return where
    plan = told.get("plan", {})
    commits = plan.get("commits", {})
    sources = [
        f"{source} at commit {commits[source]}" if source in commits else f"{source}"
        for source in plan.get("sources", ())
    ]
    return ", ".join(sources) or where


def _settings(found: Checkpoint) -> dict[str, Any]:
    """Those that make the model what it is."""
    pairs = config_io.flat(found.manifest()["config"])
    return {key: value for key, value in pairs if not key.startswith(_LEFT_OUT)}
