"""`gpt2hpc stage`: fetch on a login node what compute nodes without internet will need, into one directory with hashes."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc import cli
from gpt2hpc.data import hub, manifest, staging
from gpt2hpc.data.downloads import Downloads
from gpt2hpc.data.hub import HubFile, Repository
from gpt2hpc.data.shards import sha256_of
from gpt2hpc.data.staging import StagedFile
from gpt2hpc.errors import DataError, UsageError
from gpt2hpc.evaluation.examples import REPOSITORY as HELLASWAG

WEIGHTS = ("*.safetensors", "*.json", "merges.txt")
_AT_ONCE = 4
NOTE_EVERY_S = 10.0


@dataclass(frozen=True)
class Wanted:
    """Files of one repository, to lie in `folder`."""

    repository: Repository
    files: tuple[HubFile, ...]
    folder: str
    use: str


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc stage",
        description="Fetch from the Hugging Face Hub, where there is a network, what jobs without one will need. The same command "
        "again fetches what is missing. Jobs then run with HF_HUB_OFFLINE=1.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a directory that compute nodes see too")
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="USER/NAME",
        help="text of a dataset, for `gpt2hpc prepare --source`",
    )
    parser.add_argument(
        "--config", metavar="NAME", help="its configuration (default: its own; sample-10BT of fineweb-edu)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="its split (default: train)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the sources")
    parser.add_argument(
        "--shards",
        action="append",
        default=[],
        metavar="USER/NAME",
        help="prepared data, for --data.dir; may end in @REVISION",
    )
    parser.add_argument("--hellaswag", action="store_true", help=f"the evaluation data {HELLASWAG}")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="USER/NAME", help="a model, as openai-community/gpt2"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be fetched")
    cli.add_examples(
        parser,
        "gpt2hpc stage --source HuggingFaceFW/fineweb-edu --weights openai-community/gpt2 --out staged",
        "gpt2hpc stage --shards USER/NAME --hellaswag --out staged --dry-run",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    wanted = list(_wanted(arguments))
    if not wanted:
        raise UsageError("nothing to stage; name a --source, --shards, --weights or --hellaswag")
    for each in wanted:
        size = sum(file.bytes for file in each.files)
        cli.say(
            f"{each.repository}: {cli.plural(len(each.files), 'file')}, {size / 1e6:,.1f} MB, to {arguments.out / each.folder}"
        )
        if arguments.dry_run:
            for file in each.files:
                cli.say(f"  {file.path}  {file.bytes:,} bytes")
    if arguments.dry_run:
        return 0
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for each in wanted:
            _fetch(each, arguments.out)
    except OSError as error:
        raise DataError(
            f"--out={arguments.out}: {error.strerror or error}; what is complete is kept, so mend it and run the same command again"
        ) from error
    for each in wanted:
        cli.say(each.use.format(folder=arguments.out / each.folder))
    return 0


def _wanted(arguments: argparse.Namespace) -> Iterator[Wanted]:
    for source in arguments.source:
        dataset = hub.pinned(hub.parse(source, arguments.revision))
        files = hub.source_files(dataset, arguments.config, arguments.split)
        # Another commit, configuration or split is another dataset.
        part = f"{arguments.config or hub.DEFAULT_CONFIGS.get(dataset.repo, 'default')}-{arguments.split}"
        folder = f"datasets/{dataset.repo}/{(dataset.revision or '')[:8]}-{part}"
        yield Wanted(dataset, tuple(files), folder, "gpt2hpc prepare --source {folder} --out …")
    for source in arguments.shards:
        dataset = hub.pinned(hub.parse(source))
        listed = [
            file for file in hub.listing(dataset) if file.path == manifest.NAME or file.path.endswith((".npy", ".bin"))
        ]
        if not listed:
            raise DataError(
                f"--shards={source} holds no {manifest.NAME} and no shards; give it as --source to `prepare` from it"
            )
        yield Wanted(dataset, tuple(listed), f"shards/{dataset.repo}", "gpt2hpc train --data.dir {folder} …")
    if arguments.hellaswag:
        dataset = hub.pinned(hub.parse(HELLASWAG))
        listed = hub.source_files(dataset, None, "validation")
        yield Wanted(dataset, tuple(listed), f"datasets/{HELLASWAG}", "gpt2hpc evaluate RUN --hellaswag {folder}")
    for name in arguments.weights:
        model = hub.pinned(Repository(*_name_and_revision(name), kind="model"))
        listed = [
            file for file in hub.listing(model) if any(fnmatch.fnmatch(file.path, pattern) for pattern in WEIGHTS)
        ]
        yield Wanted(model, tuple(listed), f"models/{model.repo}", "weights: {folder}")


def _name_and_revision(text: str) -> tuple[str, str | None]:
    name, _, revision = text.partition("@")
    if not hub.is_name(name):
        raise UsageError(f"--weights={text} must be USER/NAME, as openai-community/gpt2")
    return name, revision or None


def _fetch(wanted: Wanted, out: Path) -> None:
    """Several files at once; those that are there are noted in stage.json now and then, and in the end, whatever that is."""
    known = {file.path: file for file in staging.read(out)} if staging.is_staged(out) else {}

    def one(file: HubFile) -> StagedFile | None:
        relative = f"{wanted.folder}/{file.path}"
        path, origin = out / relative, f"{wanted.repository}/{file.path}"
        before = known.get(relative)
        same = before is not None and (before.origin == origin or before.sha256 == file.sha256)
        is_here = path.is_file() and path.stat().st_size == file.bytes
        if same and is_here:
            return None
        if not (is_here and file.is_same_as(hub.file_here(path))):  # of one that was killed before it could note it
            hub.fetch(wanted.repository, file.path, path, size=file.bytes, sha256=file.sha256)
        return StagedFile(relative, file.bytes, file.sha256 or sha256_of(path), origin)

    downloads = Downloads(_AT_ONCE)
    coming = [downloads.submit(functools.partial(one, file)) for file in wanted.files]
    fresh: list[StagedFile] = []
    noted = time.monotonic()
    try:
        for number, future in enumerate(as_completed(coming), start=1):
            if (staged := future.result()) is not None:
                fresh.append(staged)
                cli.say(f"{number / len(wanted.files):4.0%}  {staged.path}  {staged.bytes / 1e6:,.1f} MB")
            if fresh and time.monotonic() - noted > NOTE_EVERY_S:
                staging.add(out, fresh)
                noted, fresh = time.monotonic(), []
    finally:
        downloads.close()
        hub.clear_leftovers(out / wanted.folder)
        if fresh:
            staging.add(out, fresh)


if __name__ == "__main__":
    sys.exit(cli.run(main))
