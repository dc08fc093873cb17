"""HellaSwag's examples, and their losses beside those of a loop over one ending at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from gpt2hpc.config import ModelConfig
from gpt2hpc.data import tokenizer
from gpt2hpc.errors import ConfigError, DataError
from gpt2hpc.evaluation import examples, hellaswag
from gpt2hpc.evaluation.examples import Example
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training.precision import Precision
from tests import questions
from tests.tiny import gpt2hpc

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, dropout=0.1)
FP32 = Precision(torch.float32, torch.device("cpu"))
COUNT = 150


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(3)
    made = GPT(SHAPE).eval()
    with torch.no_grad():
        made.wte.weight.mul_(20)  # so that endings differ by more than rounding
    return made


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return examples.load(str(questions.write(tmp_path_factory.mktemp("h") / "hellaswag_val.jsonl", COUNT)))


@torch.no_grad()
def plainly(model: GPT, facts: dict) -> tuple[list[float], list[float]]:  # type: ignore[type-arg]
    """Summed and mean losses of the four endings, each computed with its context and nothing else."""
    encode = tokenizer.gpt2().encode_ordinary
    context, sums, means = encode(facts["ctx"]), [], []
    for ending in facts["endings"]:
        tokens = torch.tensor([context + encode(" " + ending)])
        logits = model(tokens)[0, :-1, : SHAPE.vocab_size]
        losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")[len(context) - 1 :]
        sums.append(float(losses.sum()))
        means.append(float(losses.mean()))
    return sums, means


def test_every_example_is_as_in_a_plain_loop(model: GPT, read: list[Example]) -> None:
    facts = questions.examples(COUNT)
    batches = hellaswag.batches(read)
    assert len(batches) > 1
    right = right_norm = 0
    for batch in batches:
        chosen = [read[number] for number in batch]
        losses, lengths = hellaswag.losses_of(model, chosen, FP32)
        answers = hellaswag.choices(model, chosen, FP32)
        for row, number in enumerate(batch):
            sums, means = plainly(model, facts[number])
            assert losses[row].tolist() == pytest.approx(sums, abs=1e-3, rel=1e-5)
            assert (losses[row] / lengths[row]).tolist() == pytest.approx(means, abs=1e-4, rel=1e-5)
            best, best_norm = sums.index(min(sums)), means.index(min(means))
            assert answers[row].tolist() == [best, best_norm]
            right += best == facts[number]["label"]
            right_norm += best_norm == facts[number]["label"]
    found = hellaswag.score(model, read, FP32)
    assert found == hellaswag.Score(COUNT, right, right_norm)
    assert 0 < right != right_norm > 0, "the two ways to count differ here, so that neither stands for the other"
    assert (found.acc, found.acc_norm) == (right / COUNT, right_norm / COUNT)


def test_an_ending_does_not_see_the_others(model: GPT, read: list[Example]) -> None:
    """Nor does it matter which rows are beside it."""
    example = max(read, key=lambda each: each.row_length)
    other = dataclasses.replace(example, endings=(example.endings[0], (1, 2, 3), (4,), (5, 6)))
    alone, _ = hellaswag.losses_of(model, [example], FP32)
    beside, _ = hellaswag.losses_of(model, [read[0], other, read[1]], FP32)
    assert beside[1, 0].item() == pytest.approx(alone[0, 0].item(), rel=1e-5)


def test_every_example_is_in_one_batch(read: list[Example]) -> None:
    batches = hellaswag.batches(read)
    assert sorted(number for batch in batches for number in batch) == list(range(COUNT))
    for batch in batches:
        assert len(batch) * max(read[number].row_length for number in batch) <= hellaswag.BATCH_TOKENS
    huge = Example((1,) * 9000, ((1,),) * 4, 0)
    assert hellaswag.batches([huge, huge]) == [[0], [1]], "one that is larger than a batch is a batch"


def test_training_goes_on_as_it_was(model: GPT, read: list[Example]) -> None:
    """Dropout is off while it answers, and no random number is drawn."""
    model.train()
    before = torch.get_rng_state()
    first = hellaswag.score(model, read[:20], FP32)
    assert model.training
    model.eval()
    assert torch.equal(before, torch.get_rng_state())
    assert hellaswag.score(model, read[:20], FP32) == first
    assert not model.training


def test_a_long_context_loses_its_beginning(read: list[Example]) -> None:
    longest = max(read, key=lambda each: len(each.context) + max(map(len, each.endings)))
    size = len(longest.context) + max(map(len, longest.endings)) - 3
    assert longest.cropped(size).context == longest.context[3:]
    assert longest.cropped(size + 3) is longest
    with pytest.raises(ConfigError, match=r"model\.block_size=4 is too short for an ending of \d+ tokens"):
        examples.fitted(read, 4)


def test_the_file_of_the_hub_and_a_limit(tmp_path: Path, read: list[Example]) -> None:
    rows = [{**each, "label": str(each["label"])} for each in questions.examples(COUNT)]
    place = tmp_path / "data" / "validation-00000-of-00001.parquet"
    place.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), place)
    assert examples.load(str(place)) == read
    assert examples.load(str(tmp_path)) == read, "in a directory"
    assert examples.load(str(place), limit=7) == read[:7]


def test_what_was_staged_is_found_beside_other_datasets(tmp_path: Path, read: list[Example]) -> None:
    staged = tmp_path / "datasets" / "Rowan" / "hellaswag" / "data"
    questions.write(staged / "validation.jsonl", COUNT)
    questions.write(staged / ".validation.jsonl.n1.7.tmp" / "validation.jsonl", 3)  # a download that was killed
    questions.write(tmp_path / "datasets" / "some" / "texts" / "0a1b-default-train" / "val.jsonl", 2)
    assert examples.load(str(tmp_path)) == read


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 is no JSON"),
        ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": ""}', "example 1 is none of HellaSwag"),
        ('{"ctx": "a", "endings": ["b", "c", "d"], "label": 1}', "example 1 has 3 endings"),
        ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}', "label 4"),
        ("", "holds no examples"),
        ('["ctx"]', "example 1 is none of HellaSwag"),
    ],
)
def test_what_is_no_example_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "val.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(DataError, match=told):
        examples.load(str(path))


def test_a_place_without_examples_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        examples.load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="gpt2hpc stage --hellaswag"):
        examples.load(str(tmp_path))
    (tmp_path / "val.parquet").write_text(json.dumps({}))
    with pytest.raises(DataError, match="is no parquet file"):
        examples.load(str(tmp_path / "val.parquet"))


def test_without_a_network_it_is_left_out_or_staged(tmp_path: Path) -> None:
    done = gpt2hpc("evaluate", tmp_path, "--device", "cpu", env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == DataError.exit_code, done.stderr
    (line,) = done.stderr.splitlines()
    assert "is out of reach, for HF_HUB_OFFLINE is set; give --hellaswag none --val DATA, or where " in line
    assert line.endswith("`gpt2hpc stage --hellaswag`")


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is not GPT-2's 50257"):
        examples.check_model(dataclasses.replace(SHAPE, vocab_size=256, padded_vocab_size=256))
