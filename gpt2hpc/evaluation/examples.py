"""HellaSwag's examples (Zellers et al. 2019, arXiv:1905.07830): a context and four endings, of which one is right.

Read from the JSON Lines of its authors, from the Hub's parquet file, from a directory that `gpt2hpc stage --hellaswag` made, or
from the Hub itself. Tokens are those of build-nanogpt: the context, and each ending after a space.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2hpc import durable
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import hub, tokenizer
from gpt2hpc.data.hub import Repository
from gpt2hpc.errors import ConfigError, DataError

ENDINGS = 4
REPOSITORY = "Rowan/hellaswag"
HUB = f"{hub.SCHEME}{REPOSITORY}"
_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Example:
    """Tokens of a context, of four endings, and which ending is right."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    label: int

    @property
    def row_length(self) -> int:
        """Tokens of the context once and all endings."""
        return len(self.context) + sum(map(len, self.endings))

    def cropped(self, block_size: int) -> Example:
        """With the last tokens of a context that is too long with its longest ending."""
        room = block_size - max(map(len, self.endings))
        return self if len(self.context) <= room else dataclasses.replace(self, context=self.context[-room:])


def load(source: str, *, limit: int | None = None) -> list[Example]:
    """The first `limit` validation examples, or all.

    Args:
        source: A file, a directory with one, or `hf://datasets/USER/NAME[@REVISION]`.
        limit: None for all.

    Raises DataError, naming file and example, for anything that is none.
    """
    check(source)
    if hub.is_remote(source):
        return _from_hub(hub.pinned(hub.parse(source)), limit)
    return _encoded(_in_directory(Path(source)) if Path(source).is_dir() else [Path(source)], source, limit)


def load_once(source: str, kept: Path, *, limit: int | None = None) -> list[Example]:
    """The same; those of the Hub are kept in `kept`, so that later starts need no Hub, and ask the same."""
    if not hub.is_remote(source):
        return load(source, limit=limit)
    facts = durable.read_json(kept)
    if not isinstance(facts, dict) or (facts.get("source"), facts.get("limit")) != (source, limit):
        found = load(source, limit=limit)
        facts = {"source": source, "limit": limit, "examples": [dataclasses.asdict(each) for each in found]}
        durable.publish_text(kept, json.dumps(facts))
    return [
        Example(tuple(each["context"]), tuple(map(tuple, each["endings"])), each["label"]) for each in facts["examples"]
    ]


def check(source: str) -> None:
    """Raise DataError where there is nothing by that name, without reading it."""
    if hub.is_remote(source):
        hub.parse(source)
    elif not Path(source).exists():
        raise DataError(
            f"{source} does not exist; give HellaSwag's hellaswag_val.jsonl, what `gpt2hpc stage --hellaswag` made, or {HUB}"
        )


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError where GPT-2's tokens are not the model's own."""
    if model.vocab_size != tokenizer.VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is not GPT-2's {tokenizer.VOCAB_SIZE}, so HellaSwag cannot be put to it; leave it out"
        )


def fitted(examples: Sequence[Example], block_size: int) -> list[Example]:
    """The examples for a model of that context; ConfigError where an ending alone is too long for it."""
    longest = max(len(ending) for example in examples for ending in example.endings)
    if longest >= block_size:
        raise ConfigError(
            f"model.block_size={block_size} is too short for an ending of {longest} tokens; leave HellaSwag out for this model"
        )
    return [example.cropped(block_size) for example in examples]


def _from_hub(dataset: Repository, limit: int | None) -> list[Example]:
    listed = hub.source_files(dataset, None, "validation")
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(hub.fetched(dataset, file.path)) for file in listed]
        return _encoded(paths, str(dataset), limit)


def _in_directory(directory: Path) -> list[Path]:
    """The validation files there: those that were staged, beside whatever else, or all that could be it."""
    staged = directory / "datasets" / REPOSITORY
    place = staged if staged.is_dir() else directory
    there = [
        path
        for path in sorted(place.rglob("*"))
        if path.suffix in _SUFFIXES
        and "val" in path.name
        and not any(part.startswith(".") for part in path.relative_to(place).parts)  # a download that was killed
    ]
    if not there:
        raise DataError(
            f"{directory} holds no validation file of HellaSwag (*val*.jsonl, *val*.parquet); fetch it by `gpt2hpc stage --hellaswag`"
        )
    return there


def _encoded(paths: Sequence[Path], source: str, limit: int | None) -> list[Example]:
    found: list[Example] = []
    for path in paths:
        for number, facts in enumerate(_rows(path), start=1):
            if limit is not None and len(found) >= limit:
                break
            found.append(_example(facts, f"{path}: example {number}"))
    if not found:
        raise DataError(f"{source} holds no examples of HellaSwag; fetch it again")
    return found


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, columns=["ctx", "endings", "label"])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is no parquet file of HellaSwag ({error}); fetch it again") from None
        yield from table.to_pylist()
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    raise DataError(f"{path}: line {number} is no JSON; fetch the file again") from None


def _example(facts: Any, where: str) -> Example:
    try:
        context, endings, label = facts["ctx"], list(facts["endings"]), int(facts["label"])
        encode = tokenizer.gpt2().encode_ordinary
        example = Example(tuple(encode(context)), tuple(tuple(encode(f" {ending}")) for ending in endings), label)
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{where} is none of HellaSwag: it needs ctx, endings and label (the test split has no labels; use the validation split)"
        ) from None
    if len(example.endings) != ENDINGS or label not in range(ENDINGS) or not example.context:
        raise DataError(
            f"{where} has {len(endings)} endings and label {label}; it needs {ENDINGS}, and a label below {ENDINGS}"
        )
    return example
