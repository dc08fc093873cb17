"""`gpt2hpc prepare`: text in, uint16 shards with sidecars and a manifest out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli
from gpt2hpc.data import encode, sources
from gpt2hpc.data.shards import SPLITS
from gpt2hpc.errors import DataError, UsageError


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpt2hpc prepare", description="Tokenize text with GPT-2's encoding into shards to train on."
    )
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="S",
        help="a text file (.txt .text .md .rst), a .jsonl file, a directory of them, or `demo`; may be given more than once",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory for the shards and manifest.json"
    )
    parser.add_argument(
        "--document-separator",
        choices=("file", "blank-line"),
        default="file",
        help="what ends a document of a text file (default: the file's end)",
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key of a JSONL record's text (default: text)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of the documents for validation, chosen by a hash of their text "
        "(default: the first unit of about 100M tokens, or 0.1 where there is only one)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    if arguments.val_fraction is not None and not 0 < arguments.val_fraction < 1:
        raise UsageError(f"--val-fraction={arguments.val_fraction} must be above 0 and below 1; try 0.1")
    units = sources.find_units(arguments.source)
    plan = encode.make_plan(
        units, sources.Reading(arguments.document_separator, arguments.text_key), arguments.val_fraction
    )
    files, size = sum(len(unit.files) for unit in units), sum(file.bytes for unit in units for file in unit.files)
    groups = cli.plural(len(units), "group")
    cli.say(f"{cli.plural(files, 'file')}, {size / 1e6:.2f} MB of text in {groups}, to {arguments.out}")
    if arguments.dry_run:
        for unit in units:
            cli.say(f"group {unit.index}: {' and '.join(plan.splits(unit))} from {cli.plural(len(unit.files), 'file')}")
            for file in unit.files:
                cli.say(f"  {file.path}  {file.bytes:,} bytes")
        return 0
    encode.check_target(arguments.out, plan)
    try:
        _encode(arguments.out, plan)
    except OSError as error:
        raise DataError(
            f"--out={arguments.out}: {error.strerror}; what is done is kept, so mend it and run the same command again"
        ) from error
    return 0


def _encode(directory: Path, plan: encode.Plan) -> None:
    started, tokens = time.monotonic(), 0
    missing = [unit for unit in plan.units if encode.done_unit(directory, plan, unit) is None]
    if len(missing) < len(plan.units):
        cli.say(f"{cli.plural(len(plan.units) - len(missing), 'group')} done already")
    for number, unit in enumerate(missing, start=1):
        tokens += sum(shard.tokens for shard in encode.encode_unit(directory, plan, unit))
        seconds = max(time.monotonic() - started, 1e-9)
        left_s = seconds * (len(missing) - number) / number
        share = number / len(missing)
        cli.say(f"{share:4.0%}  {tokens:,} tokens  {tokens / seconds / 1e6:.2f} Mtok/s  ETA {left_s:.0f} s")
    manifest = encode.finalize(directory, plan)
    for split in SPLITS:
        documents = sum(shard.documents for shard in manifest.split(split))
        cli.say(f"{split:5} {manifest.tokens(split):,} tokens of {cli.plural(documents, 'document')}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
