"""`gpt2hpc push-data`: upload a prepared directory to a dataset repository of the Hub, verified before and after.

Shards go up in commits of a few; the manifest and the data card go last, so that a repository with a manifest is whole. The
same command again uploads what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2hpc import __version__, cli
from gpt2hpc.data import catalog, hub, hub_commit, manifest, verify
from gpt2hpc.data.hub import Repository
from gpt2hpc.data.hub_commit import CARD
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.shards import SPLITS, Shard
from gpt2hpc.errors import DataError, UsageError

SHARDS_A_COMMIT, MOST_COMMITS = 8, 50
SHARDS_ON_CARD = 1000


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc push-data",
        description="Upload prepared data to a dataset repository on the Hugging Face Hub, from where training can stream it.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `gpt2hpc prepare` made")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="created, private, if it does not exist")
    parser.add_argument("--public", action="store_true", help="create it public")
    parser.add_argument("--license", metavar="ID", help="licence of the text for the data card, as odc-by")
    parser.add_argument("--dry-run", action="store_true", help="print the data card and what would be uploaded")
    cli.add_examples(
        parser,
        "gpt2hpc push-data data/mine --repo USER/NAME --dry-run",
        "gpt2hpc push-data data/mine --repo USER/NAME --public --license odc-by",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    directory = arguments.directory
    if not (directory / manifest.NAME).is_file():
        raise DataError(f"{directory} holds no {manifest.NAME}; make it with `gpt2hpc prepare --out {directory}`")
    data = catalog.load(str(directory))
    where = hub.parse(arguments.repo)
    if where.revision is not None:
        raise UsageError(f"--repo={arguments.repo} must be USER/NAME: what is pushed becomes the newest revision")
    card = data_card(data, where.repo, arguments.license)
    if arguments.dry_run:
        cli.say(card)
        for shard in data.shards:
            cli.say(f"{shard.file}  {shard.bytes:,} bytes")
        return 0
    for shard, problem in verify.problems(data):
        if problem:
            raise DataError(f"{directory / shard.file} {problem}; nothing was uploaded")
    cli.say(f"{cli.plural(len(data.shards), 'shard')} verified")
    push(data, where, card, private=not arguments.public)
    return 0


def push(data: Manifest, where: Repository, card: str, *, private: bool) -> None:
    """Upload what the repository lacks, then compare every file's hash with the Hub's."""
    hub_commit.create(where, private=private)
    there = {file.path: file for file in hub.listing(where)}
    if manifest.NAME in there:
        with hub.fetched(where, manifest.NAME) as path:
            other = manifest.read(path, str(where)).sha256 != data.sha256
        if other:
            raise DataError(
                f"--repo={where.repo} holds other data already; choose another repository, or delete that one's files"
            )
    lacking = [shard for shard in data.shards if not _is_there(data, shard, there.get(shard.file))]
    if len(lacking) < len(data.shards):
        cli.say(f"{cli.plural(len(data.shards) - len(lacking), 'shard')} there already")
    done = 0
    size = max(SHARDS_A_COMMIT, -(-len(lacking) // MOST_COMMITS))
    for group in (lacking[at : at + size] for at in range(0, len(lacking), size)):
        names = [shard.file for shard in group]
        hub_commit.commit(where, {name: Path(data.where) / name for name in names}, f"Shards {names[0]} to {names[-1]}")
        done += len(group)
        cli.say(f"{done / len(lacking):4.0%}  {done}/{len(lacking)} shards")
    last: dict[str, Path | bytes] = {manifest.NAME: Path(data.where) / manifest.NAME}
    if hub_commit.may_write_card(where, there):
        last = {CARD: card.encode(), **last}
    else:
        cli.warn(f"{where} has a {CARD} of its own, which is left alone")
    hub_commit.commit(where, last, "Data card and manifest")
    uploaded = hub.pinned(where)
    there = {file.path: file for file in hub.listing(uploaded)}
    wrong = [shard.file for shard in data.shards if not _is_there(data, shard, there.get(shard.file))]
    if wrong:
        raise DataError(f"{uploaded}: {', '.join(wrong[:5])} did not arrive as they are; run the same command again")
    cli.say(f"every shard's hash agrees; train on it with --data.dir {uploaded}")


def _is_there(data: Manifest, shard: Shard, file: hub.HubFile | None) -> bool:
    return hub_commit.is_same(file, Path(data.where) / shard.file, sha256=shard.sha256)


def data_card(data: Manifest, repo: str, licence: str | None) -> str:
    """README.md of the repository: what it is, counts, rules and hashes."""
    rows = "\n".join(
        f"| {split} | {len(data.split(split))} | {data.tokens(split):,} | {_count(data.documents(split))} |"
        for split in SPLITS
    )
    commits = data.plan.get("commits", {})
    sources = [
        f"{source}" + (f" at commit {commits[source]}" if source in commits else "")
        for source in data.plan.get("sources", ())
    ]
    rules = data.plan.get("tokenizer", {})
    header = ["---", *([f"license: {licence}"] if licence else []), "tags: [gpt2, tokenized]", "viewer: false", "---"]
    if len(data.shards) > SHARDS_ON_CARD:
        shards = f"| the {len(data.shards):,} shards are listed in {manifest.NAME} | | | |"
    else:
        shards = "\n".join(
            f"| {shard.file} | {shard.tokens:,} | {shard.bytes:,} | `{shard.sha256}` |" for shard in data.shards
        )
    return "\n".join(
        [
            *header,
            f"# {repo}",
            "",
            f"Text as GPT-2 tokens (vocabulary of {data.vocab_size:,}), in uint16 `.npy` shards; made by gpt2hpc {__version__}.",
            "",
            f"- Source: {', '.join(sources) or 'not noted'}",
            f"- End of text (50256): {rules.get('end_of_text', 'not noted')}",
            f"- Identity (sha256 over the shards): `{data.sha256}`",
            "",
            "| split | shards | tokens | documents |",
            "| --- | --- | --- | --- |",
            rows,
            "",
            "```sh",
            f"gpt2hpc train --preset gpt2-124m --data.dir hf://datasets/{repo}",
            "```",
            "",
            "| shard | tokens | bytes | sha256 |",
            "| --- | --- | --- | --- |",
            shards,
            "",
        ]
    )


def _count(documents: int | None) -> str:
    return "not counted" if documents is None else f"{documents:,}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
