"""Generation from the cache is generation from the whole text, transformers' is the same, and `gpt2hpc sample` says what it did."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2hpc import cli, sample
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import tokenizer
from gpt2hpc.model import fit, hf_weights
from gpt2hpc.model.cache import Cache
from gpt2hpc.model.generate import Choice, generate, generate_batch
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import state
from tests.published import published

FLAT = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=250, padded_vocab_size=256)
DEEP = ModelConfig(n_layer=5, n_head=3, n_embd=48, block_size=96, vocab_size=1000, padded_vocab_size=1024)
WORDS = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=50_257, padded_vocab_size=50_304)
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], list(range(100, 120))]
GREEDY = Choice(temperature=0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lively(config: ModelConfig) -> Any:
    """Transformers' model with weights so large that what it writes varies."""
    theirs = published(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0 if "wpe" in name else 4.0)
    return theirs


def ours(theirs: Any, config: ModelConfig) -> GPT:
    """The same model; its rows of padding would win if they could."""
    model = GPT(config).eval()
    weights = fit.fitted(hf_weights.from_state_dict(theirs.state_dict()), config, config, source="theirs")
    state.load_model(model, weights.items())
    with torch.no_grad():
        model.wte.weight[config.vocab_size :] = 100.0 * torch.randn(config.padded_vocab_size - config.vocab_size, 1)
    return model


def whole(model: GPT, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy, without a cache: the last block_size tokens are read for each token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([tokens[-model.config.block_size :]]))[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def batch(model: GPT, prompts: Sequence[Sequence[int]], choice: Choice, **options: Any) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]
    options = {"max_tokens": 40, "seeds": range(len(prompts)), **options}
    for found in generate_batch(model, prompts, choice=choice, **options):
        for number, token in found.items():
            written[number].append(token)
    return written


@pytest.mark.parametrize("config", [FLAT, DEEP], ids=["flat", "deep"])
def test_greedy_text_is_transformers(config: ModelConfig) -> None:
    theirs = lively(config)
    model = ours(theirs, config)
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found = list(generate(model, prompt, max_tokens=64, temperature=0))
        assert found == expected[0, len(prompt) :].tolist()
        assert len(found) == 64
        assert len(set(found)) > 8, "a text that repeats itself compares nothing"


@pytest.mark.parametrize("config", [FLAT, DEEP], ids=["flat", "deep"])
def test_logits_from_the_cache_are_those_of_the_whole_text(config: ModelConfig) -> None:
    """Two texts of different lengths, read as a prompt, then a token and then three at a time."""
    model = ours(lively(config), config)
    texts = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([17, 12])
    cache = Cache(config, batch=2, room=24, like=model.wte.weight)

    def read_on(count: int) -> Tensor:
        positions = lengths[:, None] + torch.arange(count)
        columns = torch.arange(int(lengths.max()) + count)
        mask = (columns <= positions[..., None])[:, None]
        tokens = texts.gather(1, positions)
        return model.head(model.hidden(tokens, positions, mask, cache))

    with torch.no_grad():
        expected = model(texts)[..., : config.vocab_size]
        first = model.head(model.hidden(texts[:, :17], cache=cache))[..., : config.vocab_size]
        assert torch.equal(first, model(texts[:, :17])[..., : config.vocab_size]), (
            "the prompt is read as without a cache"
        )
        for count in (1, 1, 3):
            found = read_on(count)[..., : config.vocab_size]
            for row, start in enumerate(lengths.tolist()):
                assert torch.allclose(found[row], expected[row, start : start + count], atol=1e-4, rtol=0)
            lengths += count


def test_past_the_block_the_context_is_its_last_tokens() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=250, padded_vocab_size=256)
    model = ours(lively(config), config)
    for prompt in ([1], list(range(15)), list(range(16)), list(range(17)), list(range(40))):
        assert list(generate(model, prompt, max_tokens=40, temperature=0)) == whole(model, prompt, 40)


def test_a_batch_is_each_alone() -> None:
    """Prompts of other lengths, which stop and reach the end of the block at other times."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=250, padded_vocab_size=256)
    model = ours(lively(config), config)
    prompts = [*PROMPTS, list(range(50, 90))]
    assert batch(model, prompts, GREEDY) == [whole(model, prompt, 40) for prompt in prompts]
    stop = whole(model, prompts[1], 40)[9]
    alone = [list(generate(model, prompt, max_tokens=40, temperature=0, stop=stop)) for prompt in prompts]
    assert batch(model, prompts, GREEDY, stop=stop) == alone
    assert len({len(text) for text in alone}) > 1, "none stopped before the others"
    choice = Choice(temperature=1.2, top_k=30, top_p=0.9)
    drawn = [
        list(generate(model, prompt, max_tokens=40, temperature=1.2, top_k=30, top_p=0.9, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]
    assert batch(model, prompts, choice) == drawn
    assert batch(model, prompts, choice, seeds=range(1, 6)) != drawn


def test_padding_is_never_written() -> None:
    model = ours(lively(FLAT), FLAT)
    for choice in (GREEDY, Choice(temperature=50.0), Choice(temperature=50.0, top_k=256, top_p=0.999)):
        written = batch(model, PROMPTS, choice, max_tokens=100)
        assert {len(text) for text in written} == {100}
        assert max(max(text) for text in written) < 250
    hot = {token for text in batch(model, PROMPTS, Choice(temperature=50.0), max_tokens=100) for token in text}
    assert len(hot) > 150, "any token that exists may come"
    plain = dataclasses.replace(FLAT, padded_vocab_size=250)
    choice = Choice(temperature=1.5, top_k=253)
    assert batch(model, PROMPTS, choice) == batch(ours(lively(FLAT), plain), PROMPTS, choice), (
        "nor does it change a draw"
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (20, 0.5), (None, 1e-9), (1000, 1.0)]
)
def test_what_may_be_chosen_is_what_transformers_keeps(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3.0 * torch.randn(200, generator=torch.Generator().manual_seed(2))
    scores: Any = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores[0].softmax(-1)
    found = Choice(temperature, top_k, top_p).probabilities(logits)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose((found / found.sum()).float(), expected, atol=1e-6)


def test_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert Choice(top_k=2).probabilities(logits).nonzero().flatten().tolist() == [1, 3]
    assert Choice(top_p=0.65).probabilities(logits).nonzero().flatten().tolist() == [1, 3]
    assert Choice(top_p=0.75).probabilities(logits).nonzero().flatten().tolist() == [1, 2, 3]
    assert Choice(top_k=2, top_p=0.5).probabilities(logits).nonzero().flatten().tolist() == [1], "4/7 is enough"
    source = torch.Generator().manual_seed(0)
    drawn = [Choice(top_k=3).draw(logits, source) for _ in range(3000)]
    assert [drawn.count(token) / 3000 for token in range(4)] == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.03)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30, float("inf")])
def test_any_temperature_is_a_choice(temperature: float) -> None:
    logits = torch.tensor([1.0, 80.0, -90.0, 80.5])
    found = Choice(temperature).probabilities(logits)
    assert found.tolist() == pytest.approx([0, 0, 0, 1] if temperature < 1 else [0.25] * 4)


@given(st.lists(st.integers(0, 50_255), max_size=30))
def test_a_stream_is_the_whole_text(tokens: list[int]) -> None:
    assert "".join(tokenizer.decode_stream(tokens)) == tokenizer.decode(tokens)


def test_a_character_comes_whole() -> None:
    text = "naïve 🙂 日本語 👨‍👩‍👧"
    tokens = tokenizer.gpt2().encode_ordinary(text)
    assert any("\ufffd" in tokenizer.decode([token]) for token in tokens), "no character is split"
    parts = list(tokenizer.decode_stream(tokens))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert "".join(tokenizer.decode_stream(tokens[:-1])).endswith("\ufffd"), "an end in the middle is told, not lost"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with GPT-2's vocabulary, as transformers saves it."""
    path = tmp_path_factory.mktemp("weights")
    lively(WORDS).save_pretrained(path)
    return path


@pytest.fixture
def run_sample(weights: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`gpt2hpc sample --init …`, in this process: exit code, output, errors."""

    def run(*words: str | Path, source: Path = weights) -> tuple[int, str, str]:
        code = cli.run(sample.main, ["--init", str(source), *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_text_and_json_say_the_same(run_sample: Any, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffOnce upon\r\n\r\nÉté 🙂\u2028\r\n".encode())
    words = ["--prompt", "Hello", "--prompts", tmp_path / "prompts.txt", "--max-tokens", "12", "--seed", "3"]
    code, out, err = run_sample(*words, "--json", "--batch-size", "3")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [record["prompt"] for record in records] == ["Hello", "Once upon", "", "Été 🙂\u2028"]
    assert [record["seed"] for record in records] == [3, 4, 5, 6]
    for record in records:
        assert list(record) == ["model", "prompt", "text", "tokens", "finish_reason", "seed"]
        assert (record["model"], record["finish_reason"], len(record["tokens"])) == (str(weights), "length", 12)
        assert record["text"] == tokenizer.decode(record["tokens"])
    assert err.startswith("48 tokens in ")
    assert err.endswith("tokens/s on cpu\n")
    _, out, _ = run_sample(*words)
    heads = [f"--- {weights}: {number} of 4\n" for number in (1, 2, 3, 4)]
    assert out == "".join(f"{head}{each['prompt']}{each['text']}\n" for head, each in zip(heads, records, strict=True))
    for record in records:  # a record repeats alone by its own seed, streamed
        again = ["--prompt", record["prompt"], "--max-tokens", "12", "--seed", record["seed"]]
        code, out, err = run_sample(*map(str, again))
        assert (code, out) == (0, f"--- {weights}\n{record['prompt']}{record['text']}\n")
        assert err.startswith("12 tokens in ")


def test_seeds_and_greed(run_sample: Any) -> None:
    def text(*words: str) -> str:
        return json.loads(run_sample("--prompt", "This", "--max-tokens", "20", "--json", *words)[1])["text"]

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    greedy = text("--temperature", "0")
    assert greedy == text("--temperature", "0", "--seed", "9") == text("--top-k", "1") == text("--top-p", "1e-9")
    assert greedy != text("--temperature", "2", "--top-k", "0")


def test_the_end_of_a_document_ends_the_text(run_sample: Any, tmp_path: Path) -> None:
    """A model that writes nothing else."""
    theirs = published(WORDS)
    with torch.no_grad():
        theirs.transformer.ln_f.weight.zero_()
        theirs.transformer.ln_f.bias.fill_(1.0)
        theirs.transformer.wte.weight[tokenizer.END_OF_TEXT] = 10.0
    theirs.save_pretrained(tmp_path)
    code, out, err = run_sample("--prompt", "Hi", "--json", source=tmp_path)
    record = json.loads(out)
    assert (code, record["finish_reason"], record["text"], record["tokens"]) == (0, "stop", "", [])
    code, out, err = run_sample("--prompt", "Hi", source=tmp_path)
    assert (code, out) == (0, f"--- {tmp_path}\nHi\n")
    assert err.startswith("0 tokens in ")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--max-tokens", "0"], 2, "--max-tokens=0 must be 1 or more"),
        (["--temperature", "-1"], 2, "--temperature=-1.0 must be 0 or more"),
        (["--temperature", "nan"], 2, "--temperature=nan must be 0 or more"),
        (["--top-k", "-1"], 2, "--top-k=-1 must be 0 or more"),
        (["--top-p", "0"], 2, "--top-p=0.0 must be above 0 and at most 1"),
        (["--top-p", "1.1"], 2, "--top-p=1.1 must be above 0"),
        (["--top-p", "nan"], 2, "--top-p=nan must be above 0"),
        (["--seed", "-1"], 2, "--seed=-1 must be 0 or more"),
        (["--seed", str(2**63)], 2, "and below 2^63"),
        (["--batch-size", "0"], 2, "--batch-size=0 must be 1 or more"),
        (["--prompt", "caf\udce9"], 2, "--prompt holds bytes that are not UTF-8"),
        (["--prompts", "absent.txt"], 4, "--prompts=absent.txt is no file"),
        (["--prompts", "."], 4, "--prompts=. is no file"),
        (["--prompts", "empty.txt"], 4, "--prompts=empty.txt is empty"),
        (["--prompts", "latin.txt"], 4, "--prompts=latin.txt is not UTF-8"),
    ],
    ids=lambda value: " ".join(map(ascii, value)) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_one_line(
    words: list[str], code: int, told: str, run_sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("café\n".encode("latin-1"))
    found, out, err = run_sample(*words)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert told in err


def test_the_last_seed_is_one(run_sample: Any) -> None:
    words = ["--prompt", "a", "--prompt", "b", "--max-tokens", "2"]
    assert run_sample(*words, "--seed", str(2**63 - 1))[0] == 0


def test_a_device_that_is_not_there(run_sample: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so nothing is missing")
    code, out, err = run_sample("--device", "cuda")
    assert (code, out, err.count("\n")) == (8, "", 1)
    assert "CUDA is not available to torch" in err
    code, _, err = run_sample("--device", "auto", "--max-tokens", "1")
    assert (code, err.split(" on ")[-1]) == (0, "cpu\n")


def test_text_appears_while_it_is_written(weights: Path) -> None:
    """A text without an end is read from the pipe, where only ASCII can be printed, until it is interrupted."""
    command = [sys.executable, "-m", "gpt2hpc", "sample", "--init", str(weights), "--prompt", "Été"]
    command += ["--max-tokens", str(10**9), "--top-k", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == f"--- {weights}\n".encode()
            assert writer.stdout.read(400).decode("ascii").startswith("?t?")
            assert writer.poll() is None
            writer.send_signal(signal.SIGINT)
            _, errors = writer.communicate(timeout=60)
            assert (writer.returncode, errors) == (6, b"gpt2hpc: interrupted\n")
        finally:
            writer.kill()
