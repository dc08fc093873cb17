"""From a run to the transformers library and the Hub: real runs, the real client, a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken_ext.openai_public
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2hpc.config import ModelConfig
from gpt2hpc.data import tokenizer
from gpt2hpc.model.gpt import GPT
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import initial, state
from tests import tiny
from tests.hub_server import HubServer, serving
from tests.published import directory_of
from tests.tiny import gpt2hpc

TEXTS = [
    "Hello, world!",
    " \n\n  def f(x):\t# naïve café\n\n",
    "We'll see what it's like; they'd've said 'Tis 12345 times… 日本語 and 🙂🙃!",
    "trailing spaces   \n\t\r\n   ",
    "\u00a0\u2003\u200b\ufeff\u0085 mixed\u3000spaces",
    "नमस्ते dünya مرحبا 𝕳𝖊𝖑𝖑𝖔 ①②③ ½ e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x00\x01\x7f control " + "a" * 3000 + " " * 500,
    "",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """12 steps in two attempts, of a tiny model with GPT-2's vocabulary."""
    place = tmp_path_factory.mktemp("run")
    tiny.make_data(place / "data")
    words = [*tiny.flags(tiny.config(place / "data")), "--model.vocab_size=50257", "--model.padded_vocab_size=50304"]
    for steps in ("6", "12"):
        done = gpt2hpc("train", "--run-dir", place / "run", *words, "--steps", steps)
        assert done.returncode == 0, done.stderr
    return RunDir(place / "run")


@pytest.fixture(scope="module")
def exported(run: RunDir) -> Path:
    out = run.path.parent / "exported"
    done = gpt2hpc("export", run.path, "--out", out, "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


def refused(done: subprocess.CompletedProcess[str], code: int, told: str) -> None:
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def ours(config: ModelConfig, weights: dict[str, torch.Tensor]) -> GPT:
    model = GPT(config).eval()
    state.load_model(model, weights.items())
    return model


def test_transformers_computes_the_same(run: RunDir, exported: Path) -> None:
    config, weights = initial.of_checkpoint(tiny.newest(run))
    theirs = GPT2LMHeadModel.from_pretrained(exported).eval()
    assert theirs.transformer.wte.weight.shape == (50_257, 32)
    tokens = torch.randint(0, 50_257, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ours(config, weights)(tokens)[..., :50_257]
        assert torch.allclose(theirs(tokens).logits, expected, atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id == 50_256
    assert theirs.config.bos_token_id == 50_256


def test_it_is_initial_weights_again(run: RunDir, exported: Path, tmp_path: Path) -> None:
    """Export and import are inverses, and sample writes the same text from either."""
    config, weights = initial.of_checkpoint(tiny.newest(run))
    back = initial.initial_weights(str(exported), config)
    for name, tensor in weights.items():
        assert torch.equal(back[name][: config.vocab_size], tensor[: config.vocab_size]), name
    one = gpt2hpc("sample", run.path, "--max-tokens", "20")
    other = gpt2hpc("sample", "--init", exported, "--max-tokens", "20")
    assert one.returncode == other.returncode == 0, other.stderr
    assert one.stdout.splitlines()[1:] == other.stdout.splitlines()[1:]


def test_sample_wants_one_model(run: RunDir, tmp_path: Path) -> None:
    refused(gpt2hpc("sample"), 2, "give either RUN or --init SOURCE")
    refused(gpt2hpc("sample", run.path, "--init", "gpt2"), 2, "give either RUN or --init SOURCE")
    refused(gpt2hpc("sample", "--init", "gpt-2"), 4, "none of gpt2, gpt2-medium")
    small = ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=250, padded_vocab_size=250)
    refused(gpt2hpc("sample", "--init", directory_of(tmp_path, small)), 3, "model.vocab_size=250 is not GPT-2's 50257")


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_tokenizer_is_tiktokens(exported: Path, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(exported)
    assert theirs.encode(text) == tokenizer.gpt2().encode_ordinary(text)
    assert theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.model_max_length == 16


def test_every_character_is_tokenized_as_by_tiktoken(exported: Path) -> None:
    """Alone, beside a letter, a digit and a space: libraries differ in what Unicode calls a letter.

    All of the two planes that hold letters but Chinese ones, and some of the others.
    """
    theirs = AutoTokenizer.from_pretrained(exported).backend_tokenizer
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 97)]
    beside = [f"a{each}1 {each}b{each} {each}\n" for each in map(chr, codes)]
    for start in range(0, len(beside), 5_000):
        text = "".join(beside[start : start + 5_000])
        assert theirs.encode(text).ids == tokenizer.gpt2().encode_ordinary(text)


def test_the_end_of_text_is_one_token(exported: Path) -> None:
    text = "one<|endoftext|> two"
    assert AutoTokenizer.from_pretrained(exported).encode(text) == tokenizer.gpt2().encode(text, allowed_special="all")


def test_vocabulary_and_merges_are_those_that_openai_published(exported: Path) -> None:
    """By the sha256 that tiktoken has of them."""
    known = tiktoken_ext.openai_public.gpt2.__code__.co_consts
    hashes = [each for const in known for each in (const if isinstance(const, tuple) else (const,))]
    for name in ("vocab.json", "merges.txt"):
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() in hashes


def test_the_card_tells_the_training(run: RunDir, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    facts = tiny.newest(run).manifest()
    losses = tiny.losses(run)
    for told in (
        "license: mit",
        "| steps | 12 |",
        f"| tokens | {12 * 256:,} (epoch 1) |",
        f"| last training loss | {losses[12]:.4f} (step 12) |",
        f"| last validation loss | {tiny.losses(run, 'val')[12]:.4f} (step 12) |",
        f"`{facts['data']['manifest_sha256']}`",
        "| attempts | 2 |",
        f"torch {torch.__version__}",
        "optimizer.learning_rate: 0.01",
        f'AutoTokenizer.from_pretrained("{exported}")',
    ):
        assert told in card, told


def test_a_step_is_chosen_and_an_export_is_replaced_whole(run: RunDir, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for words in (["--step", "6"], []):
        done = gpt2hpc("export", run.path, "--out", out, *words)
        assert done.returncode == 0, done.stderr
        record = json.loads((out / "export.json").read_text())
        assert record["step"] == (6 if words else 12)
        for name, digest in record["files"].items():
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
        assert {path.name for path in out.iterdir()} == {*record["files"], "export.json"}
        assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside"
    assert (out / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    checkpoint = tiny.newest(run).path
    assert gpt2hpc("export", checkpoint, "--out", out).returncode == 0
    assert "| attempts | 2 |" in (out / "README.md").read_text()
    refused(
        gpt2hpc("export", run.path, "--out", out, "--step", "7"), 9, "no checkpoint of --step=7; it holds 12, 9, 6, 3"
    )
    refused(gpt2hpc("export", checkpoint, "--out", out, "--step", "9"), 9, "--step=9 is not that of")


def test_files_of_others_are_left_alone(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(gpt2hpc("export", run.path, "--out", out), 4, "holds notes.txt, which no export put there")
    (out / "notes.txt").unlink()
    assert gpt2hpc("export", run.path, "--out", out).returncode == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "export.json").stat().st_mtime_ns
    refused(gpt2hpc("export", run.path, "--out", out), 4, "holds notes.txt, which no export put there")
    assert (out / "export.json").stat().st_mtime_ns == before
    refused(gpt2hpc("export", run.path, "--out", out / "notes.txt"), 4, "holds notes.txt")
    refused(gpt2hpc("export", run.path, "--out", out / "notes.txt" / "x"), 4, "choose another directory")


def test_a_failure_half_way_leaves_the_earlier_export(run: RunDir, tmp_path: Path) -> None:
    """The disk is full while the new one is written."""
    out = tmp_path / "out"
    assert gpt2hpc("export", run.path, "--out", out, "--step", "6").returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    program = f"{limit}{ignore}import sys; from gpt2hpc.__main__ import console; sys.exit(console())"
    words = ["export", str(run.path), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dry_run_writes_nothing(run: RunDir, tmp_path: Path) -> None:
    done = gpt2hpc("export", run.path, "--out", tmp_path / "out", "--push", "me/model", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "| steps | 12 |" in done.stdout
    assert 'from_pretrained("me/model")' in done.stdout
    assert "and to hf://me/model" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_another_vocabulary_has_no_tokenizer(tmp_path: Path, data: Path) -> None:
    settings = tiny.flags(tiny.config(data))
    assert gpt2hpc("train", "--run-dir", tmp_path / "run", *settings, "--steps", "3").returncode == 0
    done = gpt2hpc("export", tmp_path / "run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "model.vocab_size=256 is not GPT-2's 50257: exported without a tokenizer" in done.stderr
    assert not list((tmp_path / "out").glob("*token*"))
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out").config.eos_token_id is None


# To the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server
        assert server.bugs == []


def push(
    hub: HubServer, run: RunDir, out: Path, *words: str, token: str = "hf_write"
) -> subprocess.CompletedProcess[str]:
    return gpt2hpc("export", run.path, "--out", out, "--push", "me/model", *words, env=hub.environment(token))


def test_a_push_is_one_verified_commit(hub: HubServer, run: RunDir, tmp_path: Path) -> None:
    hub.faults.error("POST .*/commit/", 1, 503)
    done = push(hub, run, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "every file's hash agrees" in done.stdout
    files = hub.files("me/model", kind="model")
    assert hub.repo("me/model", kind="model").private
    for path in (tmp_path / "out").iterdir():
        assert files[path.name] == path.read_bytes()
    assert 'from_pretrained("me/model")' in files["README.md"].decode()
    commits = len(hub.repo("me/model", kind="model").commits)
    assert commits == 2, "the repository's first, and one"
    loaded = "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    program = f"{loaded}M.from_pretrained('me/model'); print(T.from_pretrained('me/model').encode('Hello, world!'))"
    environment = {**os.environ, **hub.environment("hf_read")}
    used = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert used.returncode == 0, used.stderr
    assert "[15496, 11, 995, 0]" in used.stdout


def test_a_public_push_is_public(hub: HubServer, run: RunDir, tmp_path: Path) -> None:
    assert push(hub, run, tmp_path / "out", "--public").returncode == 0
    assert not hub.repo("me/model", kind="model").private


def test_what_cannot_be_pushed_is_said(hub: HubServer, run: RunDir, tmp_path: Path) -> None:
    refused(push(hub, run, tmp_path / "out", token="hf_read"), 4, "is refused by the Hub (403)")
    assert (tmp_path / "out" / "export.json").exists(), "the export itself is done"
    assert not [line for line in hub.requests if line.startswith("PUT")]
    wrong = gpt2hpc("export", run.path, "--out", tmp_path / "out", "--push", "model")
    refused(wrong, 2, "--push=model must be USER/NAME")
    hub.add_repo("me/model", {"model.safetensors": b"another", "README.md": b"mine"}, kind="model")
    refused(push(hub, run, tmp_path / "out"), 4, "holds a model.safetensors that no export put there")
    assert hub.files("me/model", kind="model")["model.safetensors"] == b"another"


@pytest.mark.parametrize(
    "theirs",
    [
        {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "config.json": b"llama"},
        {"pytorch_model.bin": b"x"},
        {"tokenizer.json": b"{}"},
    ],
    ids=["in pieces", "of another format", "its tokenizer"],
)
def test_a_model_of_others_is_not_written_over(
    hub: HubServer, run: RunDir, tmp_path: Path, theirs: dict[str, bytes]
) -> None:
    hub.add_repo("me/model", theirs, kind="model")
    refused(push(hub, run, tmp_path / "out"), 4, f"holds a {min(theirs)} that no export put there")
    assert hub.files("me/model", kind="model") == theirs


def test_a_card_that_was_edited_is_left_alone_and_one_that_was_not_is_renewed(
    hub: HubServer, run: RunDir, tmp_path: Path
) -> None:
    assert push(hub, run, tmp_path / "out").returncode == 0
    card = hub.files("me/model", kind="model")["README.md"]
    done = push(hub, run, tmp_path / "out", "--license", "mit")
    assert (done.returncode, done.stderr) == (0, "")
    assert b"mit" in hub.files("me/model", kind="model")["README.md"] != card
    hub.commit("me/model", {"README.md": card + b"What I know of it.\n"}, kind="model")
    done = push(hub, run, tmp_path / "out")
    assert "has a README.md of its own" in done.stderr
    assert hub.files("me/model", kind="model")["README.md"] == card + b"What I know of it.\n"


def test_a_card_of_ones_own_is_left_alone(hub: HubServer, run: RunDir, tmp_path: Path) -> None:
    hub.add_repo("me/model", {"README.md": b"mine"}, kind="model")
    done = push(hub, run, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "has a README.md of its own" in done.stderr
    assert hub.files("me/model", kind="model")["README.md"] == b"mine"


def test_what_is_not_installed_is_said(run: RunDir, tmp_path: Path) -> None:
    blocked = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == {name!r} else f(n, *a); "
    for name in ("torch", "transformers"):
        program = blocked.format(name=name) + "from gpt2hpc.__main__ import console; sys.exit(console())"
        command = [sys.executable, "-c", program, "export", str(run.path), "--out", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        refused(done, 8, f"{name} is not installed, and this command needs it: pip install 'gpt2hpc[train]'")
