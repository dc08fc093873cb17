"""The options of `gpt2hpc prepare` that `gpt2hpc submit prepare` has too: what decides the tokens, and how the work is done."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, get_args

from gpt2hpc.data import hub, plan
from gpt2hpc.data.backends import Wanted
from gpt2hpc.data.demo import DEMO
from gpt2hpc.data.plan import Separator
from gpt2hpc.errors import UsageError

FREE = ("downloads", "sources", "nothing")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What decides the tokens; `gpt2hpc submit prepare` has the same options."""
    parser.add_argument(
        "--source",
        action="append",
        metavar="S",
        help="a file (.txt .md .rst .jsonl, also .gz and .zst; .csv .tsv .json, also .gz; .parquet; .arrow), a directory of texts, "
        ".jsonl and .parquet, a dataset on the Hugging Face Hub as USER/NAME, or `demo`; may be given more than once; not needed "
        "where --out has a plan",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for shards and manifest.json")
    of_hub = "of a Hub dataset"
    parser.add_argument(
        "--config", metavar="NAME", help=f"configuration {of_hub} (default: its own; sample-10BT of fineweb-edu)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help=f"split {of_hub} (default: train)")
    parser.add_argument(
        "--revision",
        metavar="REV",
        help=f"branch, tag or commit {of_hub} (default: today's commit, pinned in the plan)",
    )
    parser.add_argument(
        "--document-separator",
        choices=get_args(Separator),
        default="file",
        help="what ends a document of a text file (default: the file's end)",
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key or column of a record's text (default: text)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of the documents for validation, chosen by a hash of their text (default: the first unit, or 0.1 where there "
        "is only one)",
    )
    parser.add_argument(
        "--unit-tokens",
        type=int,
        default=plan.UNIT_TOKENS,
        metavar="N",
        help="tokens of a unit, roughly: a shard, and the work that a kill may cost (default: 100 million)",
    )


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """What decides how the work is done, and no token."""
    parser.add_argument(
        "--tokenizer",
        choices=get_args(Wanted),
        default="auto",
        help="tiktoken is the reference; gigatoken is faster and is checked against it in each unit (default: gigatoken if installed)",
    )
    parser.add_argument(
        "--max-bad-documents",
        type=int,
        default=0,
        metavar="N",
        help="documents that may be unreadable; they are left out, and named in the manifest (default: 0)",
    )
    parser.add_argument(
        "--free",
        choices=FREE,
        default="downloads",
        help="delete what, once its units are done: what was downloaded, or the source files themselves too (default: downloads)",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes (default: one for each core that is allowed)"
    )


def check(arguments: argparse.Namespace) -> None:
    """Raise UsageError for a number that cannot be, and for a source without a name."""
    if "" in (arguments.source or ()):
        raise UsageError("--source is empty; give a file, a directory, a Hub dataset as USER/NAME, or `demo`")
    if arguments.val_fraction is not None and not 0 < arguments.val_fraction < 1:
        raise UsageError(f"--val-fraction={arguments.val_fraction} must be above 0 and below 1; try 0.1")
    for name, least in (("unit_tokens", 1), ("processes", 1), ("max_bad_documents", 0)):
        value = getattr(arguments, name, None)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')}={value} must be {least} or more")


def task_of(text: str) -> tuple[int, int]:
    task, _, tasks = text.partition("/")
    if not (task.isdecimal() and tasks.isdecimal() and int(task) < int(tasks)):
        raise UsageError(f"--task={text} must be K/N with K from 0 to N - 1, as 0/8")
    return int(task), int(tasks)


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the plan, for comparison with those of a plan that is there."""
    keys = ("config", "split", "revision", "document_separator", "text_key", "val_fraction", "unit_tokens")
    return {
        "source": [_named(each) for each in arguments.source or ()],
        **{key: getattr(arguments, key) for key in keys},
    }


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of them that are not the default, which stands for the plan's own where no --source is given."""
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    return {key: value for key, value in asked(arguments).items() if value not in (parser.get_default(key), [])}


def _named(source: str) -> str:
    """A path as an absolute one; a dataset on the Hub, and the demo, as they are."""
    is_path = Path(source).exists() or not (source == DEMO or hub.looks_like_dataset(source))
    return os.path.abspath(source) if is_path else source  # noqa: PTH100 -- links stay as they are
