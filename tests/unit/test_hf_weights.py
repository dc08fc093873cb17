"""Weights in and out of the transformers library, and the shapes that they are fitted to."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2hpc import config_io
from gpt2hpc.config import ModelConfig
from gpt2hpc.errors import ConfigError, DataError
from gpt2hpc.model import fit, hf_weights
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import state
from gpt2hpc.training.initial import initial_weights, named
from tests.hub_server import serving
from tests.published import directory_of, published

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=250, padded_vocab_size=256)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory_of(tmp_path_factory.mktemp("small"), SMALL)


def model_of(source: Path | str, config: ModelConfig) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device="cpu").eval()
    state.load_model(model, initial_weights(str(source), config).items())
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, config: ModelConfig, length: int = 16) -> torch.Tensor:
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    found = model(tokens)
    return (found if isinstance(found, torch.Tensor) else found.logits)[..., : config.vocab_size]


def test_a_directory_of_the_true_124m(tmp_path: Path) -> None:
    """The published shape, saved by transformers in a file and read back through the preset; the larger ones: test_model.py."""
    config = config_io.load(config_io.presets()["gpt2-124m"]).model
    theirs = published(config)
    theirs.save_pretrained(tmp_path)
    ours = model_of(tmp_path, config)
    assert torch.allclose(logits(ours, config), logits(theirs, config), atol=1e-4, rtol=0)
    assert torch.all(ours.wte.weight[config.vocab_size :] == 0)


def test_files_in_parts_and_of_the_bare_model(tmp_path: Path) -> None:
    """As gpt2-xl may be stored, and as openai-community/gpt2 is: without the prefix, with masks."""
    theirs = published(SMALL)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    theirs.transformer.save_pretrained(tmp_path / "bare")
    for name in ("parts", "bare"):
        assert torch.allclose(logits(model_of(tmp_path / name, SMALL), SMALL), logits(theirs, SMALL), atol=1e-5)


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    published(SMALL).half().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in initial_weights(str(tmp_path), SMALL).values()} == {torch.float32}


def test_out_and_in_again_is_the_same(directory: Path) -> None:
    weights = initial_weights(str(directory), SMALL)
    theirs = hf_weights.to_state_dict(weights, SMALL)
    assert theirs["transformer.wte.weight"].shape == (250, 32)
    back = hf_weights.from_state_dict(theirs)
    assert back.keys() == weights.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, weights[name][: len(tensor)]), name


def test_positions_are_cropped(directory: Path) -> None:
    shorter = dataclasses.replace(SMALL, block_size=8)
    ours = model_of(directory, shorter)
    assert ours.wpe.weight.shape == (8, 32)
    assert torch.equal(logits(ours, shorter, 8), logits(model_of(directory, SMALL), SMALL, 8))


def test_more_positions_are_refused(directory: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.block_size=32 is more than the 16 positions .*--model\.block_size 16"
    ):
        initial_weights(str(directory), dataclasses.replace(SMALL, block_size=32))


def test_another_shape_is_refused_by_every_key(directory: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        initial_weights(str(directory), dataclasses.replace(SMALL, n_layer=3, n_head=4, n_embd=64, vocab_size=256))
    told = caught.value.line
    for part in ("n_layer=3 but 2", "n_head=4 but 2", "n_embd=64 but 32", "vocab_size=256 but 250"):
        assert f"model.{part} there" in told
    assert told.endswith("use --model.n_layer 2 --model.n_head 2 --model.n_embd 32 --model.vocab_size 250")
    medium = config_io.load(config_io.presets()["gpt2-350m"]).model
    with pytest.raises(ConfigError, match=r"another model than .* use --preset gpt2-350m"):
        fit.check(medium, SMALL, source="gpt2-medium")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"activation_function": "relu"}, "activation_function=relu"),
        ({"n_inner": 64}, "n_inner=64"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ],
)
def test_a_twist_is_refused(settings: dict[str, object], told: str, tmp_path: Path) -> None:
    directory_of(tmp_path, SMALL, **settings)
    with pytest.raises(ConfigError, match=told):
        initial_weights(str(tmp_path), SMALL)


def test_what_is_no_gpt2_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="holds a model of type llama, not a GPT-2"):
        named(str(tmp_path))
    with pytest.raises(DataError, match=r"is no directory, no \.pt file and none of gpt2, gpt2-medium"):
        named("gpt3")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((directory / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="pickled weights are not read"):
        named(str(pickled))


def test_damaged_and_incomplete_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    weights = load_file(directory / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if name != "transformer.h.1.mlp.c_fc.weight"}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks .*h\.1\.mlp\.c_fc\.weight"):
        named(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read by transformers"):
        named(str(tmp_path))


# By a published name, from the Hub -----------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
from gpt2hpc import cli
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import patience
patience.FIRST_WAIT_S, patience.TRIES = 0.01, 3
from gpt2hpc.training.initial import named
def main(argv):
    config, weights = named(argv[0])
    print(config, float(weights["wte.weight"].double().sum()))
    return 0
sys.exit(cli.run(main))
"""


def ask(source: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(source)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_published_name_is_fetched_once_and_then_needs_no_network(directory: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    expected = str(float(initial_weights(str(directory), SMALL)["wte.weight"].double().sum()))
    with serving() as hub:
        hub.add_repo("openai-community/gpt2", {**files, "pytorch_model.bin": b"unwanted"}, kind="model")
        environment = hub.environment(home=tmp_path)
        first = ask("gpt2", environment)
        assert first.returncode == 0, first.stderr
        assert first.stderr == ""
        assert expected in first.stdout
        assert not [line for line in hub.requests if "pytorch_model.bin" in line and "resolve" in line]
        hub.requests.clear()
        again = ask("openai-community/gpt2", {**environment, "HF_HUB_OFFLINE": "1"})
        assert again.stdout == first.stdout
        assert hub.requests == []
        absent = ask("gpt2-xl", environment)
        assert (absent.returncode, absent.stderr.count("\n")) == (4, 1)
    offline = ask("gpt2-medium", {**environment, "HF_HUB_OFFLINE": "1"})
    assert (offline.returncode, offline.stderr.count("\n")) == (4, 1)
    assert "gpt2hpc stage --weights openai-community/gpt2-medium --out DIR" in offline.stderr
    assert "--init DIR/models/openai-community/gpt2-medium" in offline.stderr


def test_a_damaged_download_is_not_used(directory: Path, tmp_path: Path) -> None:
    with serving() as hub:
        hub.add_repo(
            "openai-community/gpt2", {path.name: path.read_bytes() for path in directory.iterdir()}, kind="model"
        )
        hub.faults.corrupt("GET .*resolve.*model.safetensors", 1)
        done = ask("gpt2", hub.environment(home=tmp_path))
    assert done.returncode == 4
    assert "is damaged: its sha256 is not its name" in done.stderr


def test_staged_weights_are_a_source(directory: Path, tmp_path: Path) -> None:
    """`gpt2hpc stage --weights` on a login node, `--init DIR` where there is no network."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    with serving() as hub:
        hub.add_repo("openai-community/gpt2", files, kind="model")
        words = ["stage", "--weights", "openai-community/gpt2", "--out", str(tmp_path)]
        command = [sys.executable, "-m", "gpt2hpc", *words]
        environment = {**os.environ, **hub.environment()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    place = tmp_path / "models" / "openai-community" / "gpt2"
    assert str(place) in done.stdout
    assert json.loads((tmp_path / "stage.json").read_text())
    found = ask(place, {**environment, "HF_HUB_OFFLINE": "1"})
    assert found.returncode == 0, found.stderr
