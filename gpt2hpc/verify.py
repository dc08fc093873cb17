"""`gpt2hpc verify`: hash every shard, or every staged file, and name those that are not what their manifest says."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import cli
from gpt2hpc.data import catalog, manifest, staging, verify
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.shards import sha256_of
from gpt2hpc.errors import DataError, UsageError


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(
        prog="gpt2hpc verify",
        description="Hash every shard of a prepared directory, or every file of a staged one, and compare with its manifest.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `gpt2hpc prepare` or `gpt2hpc stage` made")
    parser.add_argument(
        "--adopt",
        action="store_true",
        help=f"write a {manifest.NAME} with hashes for shards of others, which have none",
    )
    cli.add_examples(
        parser,
        "gpt2hpc verify data/mine",
        "gpt2hpc verify edu_fineweb10B --adopt   # shards of others, which have no hashes yet",
    )
    arguments = parser.parse_args(argv)
    if not arguments.directory.is_dir():
        raise DataError(
            f"{arguments.directory} is no directory here; give one that `gpt2hpc prepare` or `gpt2hpc stage` made"
        )
    if arguments.adopt:
        return _adopt(arguments.directory)
    if staging.is_staged(arguments.directory):
        found = staging.as_manifest(arguments.directory)
    else:
        found = catalog.load(str(arguments.directory))
    return _compare(found)


def _compare(found: Manifest) -> int:
    began, wrong = time.monotonic(), 0
    for shard, problem in verify.problems(found):
        if problem:
            wrong += 1
            cli.say(f"{Path(found.where) / shard.file} {problem}")
    if wrong:
        raise DataError(
            f"{wrong} of {len(found.shards)} files are damaged; delete them, and run again what made them: it "
            "does these alone"
        )
    size, seconds = sum(shard.bytes for shard in found.shards), time.monotonic() - began
    unknown = sum(shard.sha256 is None for shard in found.shards)
    by_size = f", {unknown} of them by their size alone: nobody noted their hashes" if unknown else ""
    cli.say(
        f"{cli.plural(len(found.shards), 'file')}, {size / 1e6:,.1f} MB in {seconds:.1f} s: all as they should be{by_size}"
    )
    return 0


def _adopt(directory: Path) -> int:
    """Note the hashes of shards that came without a manifest."""
    found = catalog.load(str(directory))
    if all(shard.sha256 for shard in found.shards):
        raise UsageError(f"{directory} has a manifest already; leave out --adopt")
    hashed = [dataclasses.replace(shard, sha256=sha256_of(directory / shard.file)) for shard in found.shards]
    made = manifest.publish(directory, hashed, vocab_size=found.vocab_size, plan={"adopted": True})
    cli.say(f"{directory / manifest.NAME}: {made.tokens('train'):,} train and {made.tokens('val'):,} val tokens")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
