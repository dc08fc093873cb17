"""`gpt2hpc export`: a checkpoint as a model of the transformers library, with tokenizer and model card; and to the Hub."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2hpc import __version__, cli, durable, garbage, jobs
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import hub, hub_commit, tokenizer
from gpt2hpc.data.hub import Repository
from gpt2hpc.data.hub_commit import CARD
from gpt2hpc.data.shards import sha256_of
from gpt2hpc.errors import DataError, UsageError, as_users

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2hpc.training.checkpoint import Checkpoint

RECORD = "export.json"
"""The last file that is written: which checkpoint it was, and the sha256 of every other file."""
WEIGHTS = "model.safetensors"
_OTHER_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc export",
        description="Write a checkpoint as a GPT-2 that the transformers library loads, with GPT-2's tokenizer and a model card.",
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, empty, or an earlier export")
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint of that step (default: the newest whole one)"
    )
    parser.add_argument(
        "--push",
        metavar="USER/NAME",
        help="upload it to that model repository too; created, private, if it does not exist",
    )
    parser.add_argument("--public", action="store_true", help="create it public")
    parser.add_argument("--license", metavar="ID", help="licence of the weights for the model card, as mit")
    parser.add_argument("--dry-run", action="store_true", help="print the model card and what would be written")
    cli.add_examples(
        parser,
        "gpt2hpc export runs/mine --out exported",
        "gpt2hpc export runs/mine --out exported --push USER/NAME --license mit",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    if arguments.push is not None and (hub.is_remote(arguments.push) or not hub.looks_like_dataset(arguments.push)):
        raise UsageError(f"--push={arguments.push} must be USER/NAME")
    if arguments.public and arguments.push is None:
        raise UsageError("--public is for --push USER/NAME; add it, or leave --public out")
    jobs.require_torch()
    with garbage.unsought():
        from gpt2hpc.model import hf_weights
        from gpt2hpc.training import checkpoint, initial
        from gpt2hpc.training.model_card import model_card

    hf_weights.require_transformers()
    out = arguments.out.resolve()
    refuse_other_files(out, arguments.out)
    found = checkpoint.at(arguments.path, cli.warn, step=arguments.step)
    model, weights = initial.of_checkpoint(found)
    has_tokenizer = model.vocab_size == tokenizer.VOCAB_SIZE
    name = arguments.push or str(arguments.out)
    card = model_card(found, model, name=name, has_tokenizer=has_tokenizer, licence=arguments.license)
    if not has_tokenizer:
        cli.warn(
            f"model.vocab_size={model.vocab_size} is not GPT-2's {tokenizer.VOCAB_SIZE}: exported without a tokenizer"
        )
    if arguments.dry_run:
        cli.say(card)
        cli.say(
            f"{found.path.name} would go to {arguments.out}" + (f" and to {_model(name)}" if arguments.push else "")
        )
        return 0
    publish(out, found, model, weights, card, has_tokenizer=has_tokenizer)
    cli.say(f"exported {found.path.name} to {arguments.out}")
    if arguments.push is not None:
        push(out, _model(arguments.push), private=not arguments.public)
    return 0


def _model(repo: str) -> Repository:
    return Repository(repo, kind="model")


def refuse_other_files(out: Path, given: Path) -> None:
    """Raise DataError unless `out` is absent, empty, or an earlier export and nothing else."""
    if not out.exists():
        return
    told = durable.read_json(out / RECORD) if out.is_dir() else None
    ours = {RECORD, *told["files"]} if isinstance(told, dict) and isinstance(told.get("files"), dict) else set()
    others = sorted({path.name for path in out.iterdir()} - ours) if out.is_dir() else [out.name]
    if others:
        raise DataError(
            f"--out={given} holds {', '.join(others[:3])}, which no export put there; choose an empty or a new directory"
        )


def publish(
    out: Path,
    found: Checkpoint,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    card: str,
    *,
    has_tokenizer: bool,
) -> None:
    """Write everything beside, then rename: `out` is the earlier export or the new one, but for the moment between two renames."""
    from gpt2hpc.model import hf_tokenizer, hf_weights

    temporary, earlier = durable.temporary_name(out), durable.temporary_name(out)
    try:
        temporary.mkdir(parents=True)
        end_of_text = tokenizer.END_OF_TEXT if has_tokenizer else None
        hf_weights.write(temporary, model, weights, end_of_text=end_of_text)
        if has_tokenizer:
            hf_tokenizer.write(temporary, block_size=model.block_size)
        (temporary / CARD).write_text(card, encoding="utf-8")
        _finish(temporary, found)
        if out.exists():
            out.rename(earlier)
        try:
            temporary.rename(out)
        except OSError:
            if earlier.exists():
                earlier.rename(out)
            raise
        durable.fsync_dir(out.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"--out={out} cannot be made ({error.strerror}); choose another directory") from error
    except OSError as error:
        raise as_users(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)


def _finish(directory: Path, found: Checkpoint) -> None:
    """Put every file on the disk, and the record of them last."""
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = sha256_of(path)
    record = {"gpt2hpc": __version__, "checkpoint": found.path.name, "step": found.step, "files": files}
    durable.publish_json(directory / RECORD, record)


def push(directory: Path, where: Repository, *, private: bool) -> None:
    """Upload an export in one commit, then compare every file's hash with the Hub's."""
    hub_commit.create(where, private=private)
    there = {file.path: file for file in hub.listing(where)}
    earlier = _recorded(where) if RECORD in there else {}
    written_over = {path.name for path in directory.iterdir()} & there.keys() - {*earlier, CARD, RECORD}
    loaded_instead = {name for name in there if not earlier and "/" not in name and name.endswith(_OTHER_WEIGHTS)}
    if others := sorted(written_over | loaded_instead):
        raise DataError(
            f"--push={where.repo} holds a {others[0]} that no export put there; choose another repository, or delete it there"
        )
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(directory.iterdir())}
    if not hub_commit.may_write_card(where, there, written=earlier.get(CARD)):
        cli.warn(f"{where} has a {CARD} of its own, which is left alone")
        del files[CARD]
    step = (durable.read_json(directory / RECORD) or {}).get("step")
    hub_commit.commit(where, files, f"Model of step {step}")
    uploaded = hub.pinned(where)
    there = {file.path: file for file in hub.listing(uploaded)}
    wrong = [name for name in files if not hub_commit.is_same(there.get(name), directory / name)]
    if wrong:
        raise DataError(f"{uploaded}: {', '.join(wrong[:5])} did not arrive as they are; run the same command again")
    cli.say(f"uploaded as {uploaded}; every file's hash agrees")


def _recorded(where: Repository) -> dict[str, str]:
    """The sha256 of each file that the last export to the repository has put there."""
    with hub.fetched(where, RECORD) as path:
        told = durable.read_json(path)
    files = told.get("files") if isinstance(told, dict) else None
    return files if isinstance(files, dict) else {}


if __name__ == "__main__":
    sys.exit(cli.run(main))
