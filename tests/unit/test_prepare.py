from __future__ import annotations

import gzip
import itertools
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2hpc import prepare
from gpt2hpc.data import backends, catalog, demo, encode, plan, readers, shards, sources, tokenizer
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.data.plan import Plan, Reading, Unit
from gpt2hpc.data.sources import Selection
from gpt2hpc.errors import DataError
from tests.tiny import gpt2hpc

TEXTS = [f"Document {number}: the quick brown fox.\n" * 5 for number in range(40)]


BLANK = ("\n", "\n\n", "\n \t\n", "\r\n")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / ("sub" if number % 2 else "") / f"{number:03d}.txt").write_text(text)
    return folder


def prepared(out: Path, *arguments: str | Path) -> Manifest:
    done = gpt2hpc("prepare", "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    return catalog.load(str(out))


def new_plan(source: Path, *, unit_tokens: int = 500, val_fraction: float | None = None, **reading: str) -> Plan:
    files = sources.find_files([str(source)], Selection())
    return plan.make(files, Reading(**reading), val_fraction, unit_tokens=unit_tokens)  # type: ignore[arg-type]


def encoded(directory: Path, the_plan: Plan, unit: Unit, **options: int) -> encode.Record | None:
    backend = backends.new_backend("tiktoken")
    return encode.encode_unit(
        directory, the_plan, unit, backend=backend, locate=lambda file: Path(file.path), **options
    )


def stream(found: Manifest, split: shards.Split) -> list[int]:
    return [token for shard in found.split(split) for token in np.load(Path(found.where) / shard.file).tolist()]


def plain(documents: list[str]) -> list[int]:
    """What the obvious loop gives."""
    return [token for text in documents for token in (tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(text))]


def test_a_file_is_a_document(texts: Path, tmp_path: Path) -> None:
    found = prepared(tmp_path / "out", "--source", texts)
    ordered = [path.read_text() for path in sorted(texts.rglob("*.txt"))]
    the_plan = plan.load(tmp_path / "out")
    for split in ("train", "val"):
        chosen = [text for text in ordered if the_plan.split_of(text, the_plan.units[0]) == split]
        assert chosen
        assert stream(found, split) == plain(chosen)
        assert found.documents(split) == len(chosen)


def test_jsonl_and_text_agree(texts: Path, tmp_path: Path) -> None:
    ordered = [path.read_text() for path in sorted(texts.rglob("*.txt"))]
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(json.dumps({"id": 1, "body": text}) for text in ordered) + "\n\n")
    by_line = prepared(tmp_path / "a", "--source", file, "--text-key", "body")
    by_file = prepared(tmp_path / "b", "--source", texts)
    assert [shard.sha256 for shard in by_line.shards] == [shard.sha256 for shard in by_file.shards]


def test_blank_lines_may_part_documents(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("\n \n".join(f"Paragraph {number}." for number in range(60)))
    alone = gpt2hpc("prepare", "--source", file, "--out", tmp_path / "a")
    assert alone.returncode == 4
    assert "--document-separator blank-line" in alone.stderr
    assert not (tmp_path / "a" / "manifest.json").exists()
    found = prepared(tmp_path / "b", "--source", file, "--document-separator", "blank-line")
    assert sum(shard.documents or 0 for shard in found.shards) == 60


def test_several_units_make_the_first_validation(texts: Path, tmp_path: Path) -> None:
    the_plan = new_plan(texts)
    assert len(the_plan.units) > 3
    for unit in reversed(the_plan.units):  # any order
        encoded(tmp_path, the_plan, unit)
    found = encode.finalize(tmp_path, the_plan)
    assert [shard.file for shard in found.split("val")] == ["val_000000.npy"]
    ordered = [path.read_text() for path in sorted(texts.rglob("*.txt"))]
    first = len(the_plan.units[0].pieces)
    assert stream(found, "val") == plain(ordered[:first])
    assert stream(found, "train") == plain(ordered[first:])


def test_what_is_done_is_not_done_again(texts: Path, tmp_path: Path) -> None:
    options = ("--source", texts, "--unit-tokens", "500")
    prepared(tmp_path / "out", *options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_*")}
    time.sleep(0.01)
    torn = tmp_path / "out" / shards.shard_name("train", 1)
    torn.write_bytes(torn.read_bytes()[:100])
    assert [
        unit.index for unit in encode.missing(torn.parent, plan.load(torn.parent), plan.load(torn.parent).units)
    ] == [1]
    prepared(tmp_path / "out", *options)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_*")}
    assert {name for name in after if after[name] != before[name]} == {torn.name, "unit_000001.json"}


def test_a_second_task_leaves_alone_what_the_first_has_done_meanwhile(texts: Path, tmp_path: Path) -> None:
    the_plan = new_plan(texts)

    def late(file: sources.SourceFile) -> Path:
        encoded(tmp_path, the_plan, the_plan.units[1])
        return Path(file.path)

    unit = the_plan.units[1]
    assert encode.encode_unit(tmp_path, the_plan, unit, backend=backends.new_backend("tiktoken"), locate=late) is None


def test_finalize_names_what_is_missing(texts: Path, tmp_path: Path) -> None:
    the_plan = new_plan(texts, unit_tokens=200)
    for index in (0, 3):
        encoded(tmp_path, the_plan, the_plan.units[index])
    with pytest.raises(DataError, match=r"are not done \(1-2, 4-\d+\)"):
        encode.finalize(tmp_path, the_plan)


def test_other_data_is_not_overwritten(texts: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "out", "--source", texts)
    done = gpt2hpc("prepare", "--source", texts / "sub", "--out", tmp_path / "out")
    assert done.returncode == 4
    assert "holds data of another source" in done.stderr
    (texts / "new.txt").write_text("one more")
    done = gpt2hpc("prepare", "--source", texts, "--out", tmp_path / "out")
    assert done.returncode == 4
    assert "holds data of another plan (files, units differ)" in done.stderr


def test_a_plan_of_which_nothing_is_done_may_be_replaced(texts: Path, tmp_path: Path) -> None:
    """So that the mend that a message names is not refused."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    words = ("prepare", "--source", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert "name the right one with --text-key" in gpt2hpc(*words).stderr
    assert gpt2hpc(*words, "--text-key", "content").returncode == 0
    refused = gpt2hpc(*words, "--text-key", "other")
    assert refused.returncode == 4
    assert "text-key was content" in refused.stderr


@pytest.mark.parametrize("others", [[], ["--dry-run"], ["--step", "plan"]])
def test_an_option_that_is_not_the_plans_is_refused_without_a_source_too(
    others: list[str], texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--out", str(out), "--unit-tokens", "500")
    assert prepare.main([*options, "--source", str(texts), "--step", "plan"]) == 0
    assert prepare.main([*options, *others]) == 0
    assert prepare.main(["--out", str(out), *others]) == 0
    for name, value, was in (
        ("text-key", "body", "text"),
        ("val-fraction", "0.2", "None"),
        ("unit-tokens", "7", "500"),
    ):
        with pytest.raises(DataError, match=rf"another source or rule \({name} was {was}\)"):
            prepare.main(["--out", str(out), f"--{name}", value, *others])


def test_data_without_its_plan_is_not_overwritten(texts: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "out", "--source", texts)
    (tmp_path / "out" / "plan.json").unlink()
    done = gpt2hpc("prepare", "--source", texts / "sub", "--out", tmp_path / "out")
    assert done.returncode == 4
    assert "holds data without its plan.json" in done.stderr


def test_a_half_prepared_directory_is_no_data(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--source", texts, "--out", out, "--unit-tokens", "200", "--step", "encode", "--task", "0/2")
    assert "of other tasks not done yet" in gpt2hpc("prepare", *words).stdout
    for command in (["verify", out], ["verify", out, "--adopt"], ["push-data", out, "--repo", "me/a"]):
        done = gpt2hpc(*command)
        assert done.returncode == 4, done.stdout
        assert f"`gpt2hpc prepare --out {out}`" in done.stderr
    with pytest.raises(DataError, match="is not finished"):
        catalog.load(str(out))


def test_a_source_that_changed_is_refused(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert gpt2hpc("prepare", "--source", texts, "--out", out, "--step", "plan").returncode == 0
    (texts / "000.txt").write_text("x" * (texts / "000.txt").stat().st_size)
    done = gpt2hpc("prepare", "--out", out)
    assert done.returncode == 4
    assert "000.txt changed since the plan was made" in done.stderr


# Formats ------------------------------------------------------------------------------------------------------------


def test_every_compression_and_separator_gives_the_same(texts: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    ordered = [path.read_text() for path in sorted(texts.rglob("*.txt"))]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ordered).encode()
    half = len(lines) // 2
    files = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines[:half])
        + gzip.compress(lines[half:]),  # two members, as pigz and cat make them
        "a.jsonl.zst": b"".join(pa.compress(part, "zstd", asbytes=True) for part in (lines[:half], lines[half:])),
        "a.json": lines,
    }
    found = []
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
        found.append(prepared(tmp_path / f"out-{name}", "--source", tmp_path / name, "--val-fraction", "0.3"))
    assert {tuple(shard.sha256 for shard in each.shards) for each in found} == {
        tuple(shard.sha256 for shard in found[0].shards)
    }
    assert all(found[0].documents(split) for split in shards.SPLITS)


def test_parquet_rows_are_documents_in_order(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [*TEXTS, "", "<|endoftext|> spelled out", "café 中文 \U0001f600"]
    for number in range(3):
        table = pa.table({"id": range(len(rows)), "text": [f"{number} {row}" if row else "" for row in rows]})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7)
    found = prepared(tmp_path / "out", "--source", tmp_path, "--unit-tokens", "700")
    everything = [f"{number} {row}" if row else "" for number in range(3) for row in rows]
    assert stream(found, "val") + stream(found, "train") == plain(everything)
    the_plan = plan.load(tmp_path / "out")
    assert len(the_plan.units) > 3
    assert any(len(unit.files) > 1 for unit in the_plan.units), "a unit may span files"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("separator", ["file", "blank-line"])
def test_byte_ranges_miss_and_double_nothing(count: int, separator: str, tmp_path: Path) -> None:
    paragraphs = [f"Line {number}.\n  and more\r\n" * (1 + number % 3) for number in range(23)]
    if separator == "file":
        path = tmp_path / "a.jsonl"
        path.write_text(
            "".join(json.dumps({"text": text}) + "\n" + "\n" * (number % 2) for number, text in enumerate(paragraphs))
        )
        expected = paragraphs
    else:
        path = tmp_path / "a.txt"
        path.write_bytes("".join(text + BLANK[number % len(BLANK)] for number, text in enumerate(paragraphs)).encode())
        expected = [text.replace("\r\n", "\n").rstrip("\n") for text in paragraphs]
    size = path.stat().st_size
    file = sources.find_files([str(path)], Selection())[0]
    edges = [size * number // count for number in range(count + 1)]
    pieces = [plan.Piece(0, start, stop) for start, stop in itertools.pairwise(edges)]
    reading = Reading(separator)  # type: ignore[arg-type]
    found = [text for piece in pieces for text in readers.documents(file, path, piece, reading)]
    assert found == expected


def test_a_large_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 5))
    found = prepared(tmp_path / "out", "--source", path, "--unit-tokens", "2000")
    assert len(found.shards) > 3
    assert stream(found, "val") + stream(found, "train") == plain(TEXTS * 5)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_archive_is_no_short_document(suffix: str, tmp_path: Path) -> None:
    import pyarrow as pa

    lines = "".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(TEXTS * 50)).encode()
    whole = gzip.compress(lines) if suffix.endswith("gz") else pa.compress(lines, "zstd", asbytes=True)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    done = gpt2hpc("prepare", "--source", path, "--out", tmp_path / "out")
    assert done.returncode == 4
    assert f"a{suffix} cannot be read" in done.stderr


# Documents that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.txt", b"caf\xe9", "is not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "bad.jsonl:2 is not JSON"),
        ("bad.jsonl", b'{"text": "a\\ud800"}\n', "bad.jsonl:1 holds half a surrogate pair"),
        ("empty.txt", b"", "--source holds 0 documents"),
        ("bad.jsonl", b'{"txt": "a"}\n', "bad.jsonl:1 has no text under the key 'text'"),
        ("bad.parquet", b"PAR1 no", "is no parquet file"),
    ],
)
def test_a_bad_document_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    done = gpt2hpc("prepare", "--source", tmp_path / name, "--out", tmp_path / "out")
    assert done.returncode == 4
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_documents_within_the_limit_are_named_in_the_manifest(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    invalid = pa.array([b"fine", b"caf\xe9", b"also fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["good", None, *TEXTS]}), tmp_path / "b.parquet")
    refused = gpt2hpc("prepare", "--source", tmp_path, "--out", tmp_path / "out", "--max-bad-documents", "1")
    assert refused.returncode == 4
    assert "2 documents cannot be read, --max-bad-documents=1" in refused.stderr
    found = prepared(tmp_path / "out", "--source", tmp_path, "--max-bad-documents", "2")
    assert (found.documents("train") or 0) + (found.documents("val") or 0) == 3 + len(TEXTS)
    named = json.loads((tmp_path / "out" / "manifest.json").read_text())["bad_documents"]
    assert [each["where"].rpartition("/")[2] for each in named] == [
        "a.parquet row group 0 row 1",
        "b.parquet row group 0 row 1",
    ]
    assert "is not UTF-8" in named[0]["why"]


def test_nothing_is_read_after_the_document_that_is_one_too_many(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def bad(*arguments: object) -> Iterator[readers.Document]:
        for number in range(10):
            read.append(number)
            yield readers.Bad(f"line {number}", "is bad")

    monkeypatch.setattr(readers, "documents", bad)
    the_plan = new_plan(texts)
    with pytest.raises(DataError, match=r"3 documents cannot be read.*the first: line 0 is bad"):
        encoded(tmp_path, the_plan, the_plan.units[0], max_bad_documents=2)
    assert read == [0, 1, 2]


def test_the_lines_before_a_piece_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 10 + "{\n" * 5)
    file = sources.find_files([str(path)], Selection())[0]
    counted, count = [], readers._lines_before

    def counting(path: Path, position: int) -> int:
        counted.append(position)
        return count(path, position)

    monkeypatch.setattr(readers, "_lines_before", counting)
    piece = plan.Piece(0, 50, file.bytes)
    found = [each for each in readers.documents(file, path, piece, Reading()) if isinstance(each, readers.Bad)]
    assert [each.where for each in found] == [f"{path}:{number}" for number in range(11, 16)]
    assert counted == [56]


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": TEXTS, "id": range(len(TEXTS))}), tmp_path / "a.parquet")
    done = gpt2hpc("prepare", "--source", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 4
    assert "has no column 'text' but body, id; name the text with --text-key" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--source", "/nowhere"], 4, "--source=/nowhere does not exist"),
        (["--source", ""], 2, "--source is empty; give a file"),
        (["--source", "demo", "--val-fraction", "2"], 2, "--val-fraction=2.0"),
        (["--source", "demo", "--out", "/proc/nowhere"], 4, "--out=/proc/nowhere cannot be written"),
        (["--source", "demo", "--task", "3/3"], 2, "--task=3/3 must be K/N"),
        (["--source", "demo", "--processes", "0"], 2, "--processes=0 must be 1 or more"),
        (["--source", "demo", "--task", "0/3"], 2, "--task=0/3 needs --step encode"),
        (["--source", "./gone.txt"], 4, "--source=./gone.txt does not exist"),
        (["--source", "gone/a.txt"], 4, "--source=gone/a.txt does not exist"),
        ([], 2, "holds no plan yet"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = gpt2hpc("prepare", "--out", tmp_path / "out", *arguments)
    assert done.returncode == code
    assert words in done.stderr


def test_dry_run_writes_nothing(texts: Path, tmp_path: Path) -> None:
    done = gpt2hpc("prepare", "--source", texts, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "unit 0: train and val" in done.stdout
    assert not (tmp_path / "out").exists()


# Tasks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 3, 8, 50])
def test_tasks_share_the_units(texts: Path, tasks: int) -> None:
    the_plan = new_plan(texts)
    shares = [the_plan.share(task, tasks) for task in range(tasks)]
    assert [unit for share in shares for unit in share] == list(the_plan.units)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_last_task_writes_the_manifest(texts: Path, tmp_path: Path) -> None:
    options = ("--source", texts, "--unit-tokens", "500")
    whole = prepared(tmp_path / "whole", *options)
    out = tmp_path / "shared"
    for task in (2, 0, 1):
        assert not (out / "manifest.json").exists()
        done = gpt2hpc("prepare", "--out", out, *options, "--step", "encode", "--task", f"{task}/3")
        assert done.returncode == 0, done.stderr
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    assert [(out / shard.file).read_bytes() for shard in whole.shards] == [
        (tmp_path / "whole" / shard.file).read_bytes() for shard in whole.shards
    ]


@pytest.mark.parametrize(("free", "left"), [("sources", 0), ("downloads", 40)])
def test_sources_are_freed_if_asked(texts: Path, tmp_path: Path, free: str, left: int) -> None:
    prepared(tmp_path / "out", "--source", texts, "--unit-tokens", "500", "--free", free)
    assert len(list(texts.rglob("*.txt"))) == left


def test_freed_sources_are_not_missed(texts: Path, tmp_path: Path) -> None:
    """The same command again goes on with the plan."""
    words = ("--source", texts, "--unit-tokens", "500", "--free", "sources")
    prepared(tmp_path / "out", *words)
    prepared(tmp_path / "out", *words)
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for _ in range(2):
        prepared(tmp_path / "b", "--source", tmp_path / "one.jsonl", "--free", "sources")


def test_nothing_is_freed_that_may_be_wanted_again(texts: Path, tmp_path: Path) -> None:
    """A split without documents is mended by another plan, which needs the sources."""
    few = tmp_path / "few"
    few.mkdir()
    for number in range(3):
        (few / f"{number}.txt").write_text(f"text {number}")
    words = ("--source", few, "--out", tmp_path / "out", "--val-fraction", "0.000001", "--free", "sources")
    done = gpt2hpc("prepare", *words)
    assert done.returncode == 4
    assert "fell to the val split" in done.stderr
    assert len(list(few.iterdir())) == 3


def test_finalizing_twice_at_once_does_no_harm(texts: Path, tmp_path: Path) -> None:
    the_plan = new_plan(texts)
    for unit in the_plan.units:
        encoded(tmp_path, the_plan, unit)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: encode.finalize(tmp_path, the_plan), range(60)))
    assert len({each.sha256 for each in made}) == 1


def test_a_doubled_task_whose_source_was_freed_meanwhile(texts: Path, tmp_path: Path) -> None:
    the_plan = new_plan(texts)
    unit = the_plan.units[1]

    def freed(file: sources.SourceFile) -> Path:
        encoded(tmp_path, the_plan, unit)
        Path(file.path).unlink()
        return Path(file.path)

    assert encode.encode_unit(tmp_path, the_plan, unit, backend=backends.new_backend("tiktoken"), locate=freed) is None


# Names --------------------------------------------------------------------------------------------------------------


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    for name, count in (("part[1].csv", 40), ("part1.csv", 7)):
        (tmp_path / name).write_text("text\n" + "".join(f'"{name} {number}"\n' for number in range(count)) + "NA\n")
    found = prepared(tmp_path / "out", "--source", tmp_path / "part[1].csv", "--val-fraction", "0.4")
    assert sum(found.documents(split) or 0 for split in shards.SPLITS) == 41


def test_a_source_named_twice_is_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(texts)
    for again in (texts, texts / "sub", tmp_path / "link"):
        done = gpt2hpc("prepare", "--source", texts, "--source", again, "--out", tmp_path / "out")
        assert done.returncode == 4
        assert "name it once" in done.stderr


def test_links_are_followed_once(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(texts)
    (texts / "loop").symlink_to(texts)
    assert len(sources.find_files([str(folder)], Selection())) == len(TEXTS)


def test_one_name_of_a_folder_counts_however_it_is_listed(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "z"):
        (tmp_path / name).symlink_to(texts)
    walk, found = os.walk, []
    for backwards in (False, True):

        def listed(
            *arguments: Any, backwards: bool = backwards, **options: Any
        ) -> Iterator[tuple[str, list[str], list[str]]]:
            for folder, folders, names in walk(*arguments, **options):
                folders.sort(reverse=backwards)
                yield folder, folders, names

        monkeypatch.setattr(os, "walk", listed)
        found.append(sources.find_files([str(tmp_path)], Selection()))
    assert found[0] == found[1]
    assert {Path(file.path).relative_to(tmp_path).parts[0] for file in found[0]} == {"a"}


def test_a_link_to_nothing_is_no_gap(texts: Path) -> None:
    (texts / "notes").symlink_to("gone")
    assert len(sources.find_files([str(texts)], Selection())) == len(TEXTS)
    (texts / "part.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"part\.jsonl cannot be read \(No such file or directory\)"):
        sources.find_files([str(texts)], Selection())


def test_capitals_of_a_suffix_do_not_matter(tmp_path: Path) -> None:
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "LINES.JSONL").write_bytes(records)
    (tmp_path / "packed.Jsonl.GZ").write_bytes(gzip.compress(records))
    assert len(sources.find_files([str(tmp_path)], Selection())) == 2
    (tmp_path / "ROWS.JSON.GZ").write_bytes(gzip.compress(records))
    (tmp_path / "TABLE.TSV").write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS))
    for path in tmp_path.iterdir():
        (file,) = sources.find_files([str(path)], Selection())
        assert list(readers.documents(file, path, plan.Piece(0, 0, file.bytes), Reading())) == TEXTS, path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text\na\nb,c,d\n", "a.csv cannot be read"),
        ("a.json", b'{"text": "a"', "a.json cannot be read"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl:1 is not JSON"),
    ],
)
def test_what_a_library_cannot_read_is_a_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    done = gpt2hpc("prepare", "--source", tmp_path / name, "--out", tmp_path / "out")
    assert done.returncode == 4, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


ROWS = json.dumps([{"text": text, "n": number} for number, text in enumerate(TEXTS * 20)]).encode()


DAMAGED = {
    "truncated.json.gz": gzip.compress(ROWS)[:-100],
    "truncated.csv.gz": gzip.compress(b"n,text\n" + b"1,a\n" * 1000)[:-10],
    "flipped.json.gz": gzip.compress(ROWS)[:200] + b"\xff" * 50 + gzip.compress(ROWS)[250:],
    "empty.json": b"",
    "empty.json.gz": gzip.compress(b""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    file = sources.find_files([str(path)], Selection())[0]
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        list(readers.documents(file, path, plan.Piece(0, 0, file.bytes), Reading()))


@pytest.mark.parametrize(
    "kind", [".csv.zst", ".tsv.zst", ".json.zst", ".arrow.gz", ".arrow.zst", ".parquet.gz", ".CSV.ZST"]
)
def test_an_archive_that_cannot_be_read_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"a{kind}").write_bytes(b"anything")
    with pytest.raises(DataError, match=rf"a{kind} is read unpacked only; unpack it"):
        sources.find_files([str(tmp_path / f"a{kind}")], Selection())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    file = sources.find_files([str(tmp_path / "a.txt")], Selection())[0]
    assert list(readers.documents(file, tmp_path / "a.txt", plan.Piece(0, 0, 8), Reading())) == ["hello"]


def test_a_file_that_cannot_be_cut_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    )
    done = gpt2hpc("prepare", "--source", tmp_path, "--out", tmp_path / "out", "--unit-tokens", "10", "--step", "plan")
    assert done.returncode == 0
    assert "a.jsonl.gz cannot be cut; make smaller files" in done.stderr


def test_a_truncated_plan_is_said(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "out"
    prepared(out, "--source", texts)
    prepared(tmp_path / "data" / "whole", "--source", texts)
    (out / "plan.json").write_text('{"format"')
    assert "plan.json is damaged" in gpt2hpc("prepare", "--out", out, "--source", texts).stderr
    status = gpt2hpc("status", tmp_path / "data")
    assert "damaged" in status.stdout
    assert "prepared" in status.stdout


# What is there ------------------------------------------------------------------------------------------------------


def test_an_edited_manifest_is_refused(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 5000', '"tokens": 5001'))
    with pytest.raises(DataError, match="was edited"):
        catalog.load(str(data))


def test_an_edited_plan_is_refused(texts: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "out", "--source", texts)
    path = tmp_path / "out" / "plan.json"
    path.write_text(path.read_text().replace('"val_fraction": 0.1', '"val_fraction": 0.2'))
    with pytest.raises(DataError, match="was edited"):
        plan.load(tmp_path / "out")


def test_a_truncated_shard_is_refused(data: Path) -> None:
    found = catalog.load(str(data))
    path = data / found.shards[1].file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="bytes, its manifest says"):
        shards.open_shard(path, found.shards[1])


def test_demo_is_real_text() -> None:
    texts = list(demo.demo_documents())
    assert sum(map(len, texts)) > 1_000_000
    assert any("statement is used for conditional execution" in text for text in texts)
