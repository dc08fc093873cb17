from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2hpc.data import encode, manifest, shards, sources, tokenizer
from gpt2hpc.data.sources import Reading
from gpt2hpc.errors import DataError
from tests.tiny import gpt2hpc

TEXTS = [f"Document {number}: the quick brown fox.\n" * 5 for number in range(40)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / ("sub" if number % 2 else "") / f"{number:03d}.txt").write_text(text)
    return folder


def prepared(out: Path, *arguments: str | Path) -> manifest.Manifest:
    done = gpt2hpc("prepare", "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    return manifest.load(out)


def stream(found: manifest.Manifest, split: shards.Split) -> list[int]:
    return [token for shard in found.split(split) for token in np.load(found.directory / shard.file).tolist()]


def plain(documents: list[str]) -> list[int]:
    """What the obvious loop gives."""
    return [token for text in documents for token in (tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(text))]


def test_a_file_is_a_document(texts: Path, tmp_path: Path) -> None:
    found = prepared(tmp_path / "out", "--source", texts)
    ordered = [path.read_text() for path in sorted(texts.rglob("*.txt"))]
    plan = encode.make_plan(sources.find_units([str(texts)]), Reading(), None)
    for split in ("train", "val"):
        chosen = [text for text in ordered if plan.split_of(text, plan.units[0]) == split]
        assert chosen
        assert stream(found, split) == plain(chosen)
        assert sum(shard.documents for shard in found.split(split)) == len(chosen)


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
    assert sum(shard.documents for shard in found.shards) == 60


def test_several_units_make_the_first_validation(texts: Path, tmp_path: Path) -> None:
    units = sources.find_units([str(texts)], unit_bytes=2000)
    assert len(units) > 3
    plan = encode.make_plan(units, Reading(), None)
    for unit in reversed(units):  # any order
        encode.encode_unit(tmp_path, plan, unit)
    found = encode.finalize(tmp_path, plan)
    assert [shard.file for shard in found.split("val")] == ["val_000000.npy"]
    ordered = [path.read_text() for path in sorted(texts.rglob("*.txt"))]
    first = len(units[0].files)
    assert stream(found, "val") == plain(ordered[:first])
    assert stream(found, "train") == plain(ordered[first:])


def test_what_is_done_is_not_done_again(texts: Path, tmp_path: Path) -> None:
    plan = encode.make_plan(sources.find_units([str(texts)], unit_bytes=2000), Reading(), None)
    for unit in plan.units:
        encode.encode_unit(tmp_path, plan, unit)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*_*")}
    time.sleep(0.01)
    torn = tmp_path / shards.shard_name("train", 1)
    torn.write_bytes(torn.read_bytes()[:100])
    assert [unit.index for unit in plan.units if encode.done_unit(tmp_path, plan, unit) is None] == [1]
    encode.encode_unit(tmp_path, plan, plan.units[1])
    encode.finalize(tmp_path, plan)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*_*")}
    assert {name for name in after if after[name] != before[name]} == {torn.name, torn.with_suffix(".json").name}


def test_finalize_names_what_is_missing(texts: Path, tmp_path: Path) -> None:
    plan = encode.make_plan(sources.find_units([str(texts)], unit_bytes=2000), Reading(), None)
    with pytest.raises(DataError, match=r"val_000000\.npy is not done"):
        encode.finalize(tmp_path, plan)


def test_other_data_is_not_overwritten(texts: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "out", "--source", texts)
    done = gpt2hpc("prepare", "--source", texts / "sub", "--out", tmp_path / "out")
    assert done.returncode == 4
    assert "holds data of another source" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.txt", b"caf\xe9", "is not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "bad.jsonl:2 is not JSON"),
        ("bad.jsonl", b'{"text": "a\\ud800"}\n', "bad.jsonl:1 holds half a surrogate pair"),
        ("empty.txt", b"", "--source holds 0 documents"),
        ("bad.jsonl", b'{"txt": "a"}\n', "bad.jsonl:1 has no text under the key 'text'"),
    ],
)
def test_a_bad_document_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    done = gpt2hpc("prepare", "--source", tmp_path / name, "--out", tmp_path / "out")
    assert done.returncode == 4
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--source", "/nowhere"], 4, "--source=/nowhere does not exist"),
        (["--source", "demo", "--val-fraction", "2"], 2, "--val-fraction=2.0"),
        (["--source", "demo", "--out", "/proc/nowhere"], 4, "--out=/proc/nowhere cannot be made"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = gpt2hpc("prepare", "--out", tmp_path / "out", *arguments)
    assert done.returncode == code
    assert words in done.stderr


def test_dry_run_writes_nothing(texts: Path, tmp_path: Path) -> None:
    done = gpt2hpc("prepare", "--source", texts, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "group 0: train and val from 40 files" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_edited_manifest_is_refused(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 5000', '"tokens": 5001'))
    with pytest.raises(DataError, match="was edited"):
        manifest.load(data)


def test_a_truncated_shard_is_refused(data: Path) -> None:
    found = manifest.load(data)
    path = data / found.shards[1].file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="bytes, its manifest says"):
        shards.open_shard(path, found.shards[1])


def test_demo_is_real_text() -> None:
    texts = list(sources.demo_documents())
    assert sum(map(len, texts)) > 1_000_000
    assert any("statement is used for conditional execution" in text for text in texts)
