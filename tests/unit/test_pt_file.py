"""`.pt` files of build-nanogpt and nanoGPT, good ones, damaged ones and hostile ones."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gpt2hpc.config import Config, ModelConfig, OptimizerConfig
from gpt2hpc.errors import ConfigError, DataError
from gpt2hpc.model import fit
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training import pt_file, resume, state
from gpt2hpc.training.initial import initial_weights
from gpt2hpc.training.optimizer import new_optimizer

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256, padded_vocab_size=256)

# In a process of its own, as a user's program is: its class lives in a __main__ that is not ours.
MAKER = """
import sys, dataclasses, numpy, torch
from torch import nn

@dataclasses.dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 256
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, c.block_size, c.block_size)))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(c.n_embd), Attention(c), nn.LayerNorm(c.n_embd)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(c.n_embd, 4 * c.n_embd), "c_proj": nn.Linear(4 * c.n_embd, c.n_embd)})

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(Block(c) for _ in range(c.n_layer)), ln_f=nn.LayerNorm(c.n_embd)))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

torch.manual_seed(0)
config = GPTConfig()
model = GPT(config)
parameters = dict(model.named_parameters()).values()
groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
          {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3)
for _ in range(3):
    sum((p ** 2).sum() * (1 + n) for n, p in enumerate(parameters)).backward()
    optimizer.step()
    optimizer.zero_grad()
state = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
extra = {"rng_state": {"torch": torch.get_rng_state(), "numpy": numpy.random.get_state()}, "scaler": {"scale": 1024.0,
         "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}}
if STYLE == "build-nanogpt":
    file = {"model": state, "optimizer": optimizer.state_dict(), "config": config, "step": 3, "val_loss": numpy.float64(4.5), **extra}
else:
    file = {"model": state, "optimizer": optimizer.state_dict(), "model_args": vars(config) | {"bias": True, "dropout": 0.0},
            "iter_num": 3, "best_val_loss": torch.tensor(4.5), "config": {"batch_size": 12}}
torch.save(file, sys.argv[1])
torch.save({name.removeprefix("transformer."): p.detach() for name, p in model.named_parameters()}, sys.argv[1] + ".plain")
names = {p: name.removeprefix("transformer.") for name, p in model.named_parameters()}
moments = {names[p]: {kind: value for kind, value in optimizer.state[p].items()} for p in parameters}
torch.save(moments, sys.argv[1] + ".moments")
"""


def make(path: Path, style: str = "build-nanogpt", prefix: str = "") -> Path:
    program = f"PREFIX, STYLE = {prefix!r}, {style!r}\n{MAKER}"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pt") / "model.pt")


@pytest.mark.parametrize(
    ("style", "prefix"), [("build-nanogpt", ""), ("nanogpt", "_orig_mod."), ("build-nanogpt", "module._orig_mod.")]
)
def test_all_of_it_is_found(style: str, prefix: str, tmp_path: Path) -> None:
    found = pt_file.read(make(tmp_path / "a.pt", style, prefix))
    assert found.config == SMALL
    assert (found.step, found.val_loss) == (3, 4.5)
    assert found.scaler == ({"scale": 1024.0, "_growth_tracker": 7} if style == "build-nanogpt" else {})
    plain, moments = torch.load(tmp_path / "a.pt.plain"), torch.load(tmp_path / "a.pt.moments")
    assert {name for name in found.tensors if name.startswith("model/")} == {f"model/{name}" for name in plain}
    for name, tensor in plain.items():
        assert torch.equal(found.tensors[f"model/{name}"], tensor)
        for kind, moment in moments[name].items():
            assert torch.equal(found.tensors[f"optimizer/{kind}/{name}"], moment)


def test_a_file_continues_as_its_own_program_would(good: Path) -> None:
    """Model and optimizer take it, and the next step is AdamW's fourth from these moments."""
    found = pt_file.read(good)
    model, theirs = GPT(SMALL), GPT(SMALL)
    optimizer = new_optimizer(model, OptimizerConfig())
    state.load_model(model, ((n, t) for n, t in found.tensors.items() if n.startswith("model/")))
    state.load_optimizer(optimizer, model, ((n, t) for n, t in found.tensors.items() if n.startswith("optimizer/")))
    theirs.load_state_dict(torch.load(f"{good}.plain"))
    again = new_optimizer(theirs, OptimizerConfig())
    moments = torch.load(f"{good}.moments")
    for name, parameter in theirs.named_parameters():
        again.state[parameter] = {kind: value.clone() for kind, value in moments[name].items()}
    for each, adam in ((model, optimizer), (theirs, again)):
        tokens = torch.arange(32).view(2, 16)
        each(tokens, tokens).backward()
        adam.step()
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_does_not_go_on_with_adamws_state(good: Path, tmp_path: Path) -> None:
    config = Config(model=SMALL, optimizer=OptimizerConfig(name="muon"))
    with pytest.raises(
        ConfigError, match=r"holds AdamW's state, but optimizer.name=muon; use --optimizer.name adamw, or --init"
    ):
        resume.imported(good, tmp_path, config, print)


def test_as_initial_weights_it_is_fitted(good: Path) -> None:
    wanted = dataclasses.replace(SMALL, padded_vocab_size=384, block_size=8)
    weights = initial_weights(str(good), wanted)
    plain = torch.load(f"{good}.plain")
    assert torch.equal(weights["wte.weight"][:256], plain["wte.weight"])
    assert torch.all(weights["wte.weight"][256:] == 0)
    assert torch.equal(weights["wpe.weight"], plain["wpe.weight"][:8])
    moments = fit.fitted(pt_file.read(good).tensors, SMALL, wanted, source=str(good))
    assert moments["optimizer/exp_avg/wte.weight"].shape == (384, 32)
    assert moments["optimizer/step/wte.weight"].shape == ()
    with pytest.raises(ConfigError, match=r"model\.n_layer=4 but 2 there"):
        initial_weights(str(good), dataclasses.replace(SMALL, n_layer=4))


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in GPT(config).named_parameters()}


def test_rows_of_padding_are_told_from_the_vocabulary(tmp_path: Path) -> None:
    """build-nanogpt has 50304 rows for 50257 tokens."""
    padded = dataclasses.replace(SMALL, vocab_size=50_304, padded_vocab_size=50_304, n_layer=1)
    weights = weights_of(padded)
    torch.save({"model": weights, "config": {"n_head": 2}}, tmp_path / "a.pt")
    wanted = dataclasses.replace(padded, vocab_size=50_257, padded_vocab_size=50_304)
    assert pt_file.read(tmp_path / "a.pt").config == wanted
    fitted = initial_weights(str(tmp_path / "a.pt"), wanted)["wte.weight"]
    assert torch.equal(fitted[:50_257], weights["wte.weight"][:50_257])
    assert torch.all(fitted[50_257:] == 0)


def test_a_bare_model_is_enough(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, n_head=1, n_embd=64)
    torch.save({"model": weights_of(config)}, tmp_path / "a.pt")
    found = pt_file.read(tmp_path / "a.pt")
    assert (found.config, found.step, found.val_loss, found.scaler) == (config, 0, None, {})
    assert not found.has_optimizer
    torch.save({"model": weights_of(SMALL)}, tmp_path / "b.pt")
    with pytest.raises(ConfigError, match="does not tell n_head"):
        pt_file.read(tmp_path / "b.pt")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("in_zip", [True, False])
def test_a_hostile_file_is_refused_and_does_nothing(protocol: int, in_zip: bool, tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {witness}",)

    contents = {"model": weights_of(SMALL), "config": Hostile()}
    path = tmp_path / "a.pt"
    if in_zip:
        torch.save(contents, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps({"config": Hostile()}, protocol=protocol))
    with pytest.raises(DataError) as caught:
        pt_file.read(path)
    assert not witness.exists()
    if in_zip and protocol == 2:
        assert f"asks for {os.system.__module__}.system when it is read" in caught.value.line
    if in_zip:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert witness.exists(), "it is hostile"


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "subprocess.Popen", "posix.EvilConfig", "__main__.GPTConfig"]
)
def test_whatever_it_asks_for_by_name_nothing_is_called(name: str, tmp_path: Path) -> None:
    """A class of settings by its name is an empty one of ours, whatever module the file claims it is from."""
    witness = tmp_path / "witness"
    module, _, attribute = name.rpartition(".")
    call = (
        b"c"
        + f"{module}\n{attribute}\n".encode()
        + b"(X"
        + len(text := f"touch {witness}".encode()).to_bytes(4, "little")
        + text
        + b"tR"
    )
    pickled = b"\x80\x02}X\x06\x00\x00\x00config" + call + b"s."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    told = {"__main__.GPTConfig": "holds no weights", "posix.EvilConfig": "module posix is blocked"}
    with pytest.raises(DataError, match=told.get(name, f"asks for {name}")):
        pt_file.read(tmp_path / "a.pt")
    assert not witness.exists()


def test_what_is_damaged_or_else_is_said(good: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(good.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"is damaged, or no file of torch\.save"):
        pt_file.read(cut)
    with pytest.raises(DataError, match="cannot be read"):
        pt_file.read(tmp_path / "absent.pt")
    for contents, kind, told in (
        ({"weights": 1}, DataError, "holds no weights under the key model"),
        ({"model": {"a": torch.zeros(1)}}, ConfigError, "so no GPT-2"),
        (
            {"model": {n: t for n, t in weights_of(SMALL).items() if not n.endswith("bias")}, "config": {"n_head": 2}},
            ConfigError,
            "with biases",
        ),
        ({"model": weights_of(SMALL), "config": {"n_head": 3}}, ConfigError, "n_head=3 does not divide"),
        (
            {"model": weights_of(SMALL), "config": {"n_head": 2}, "step": "later"},
            DataError,
            "has not the layout of build-nanogpt or nanoGPT",
        ),
    ):
        torch.save(contents, tmp_path / "a.pt")
        with pytest.raises(kind, match=told):
            pt_file.read(tmp_path / "a.pt")


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = GPT(SMALL)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)).backward()
    sgd.step()
    contents = {"model": weights_of(SMALL), "config": {"n_head": 2}, "optimizer": sgd.state_dict()}
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"holds an optimizer that is not AdamW of this model .*; use it with --init"):
        pt_file.read(tmp_path / "a.pt")
    adam = torch.optim.AdamW(nn.Linear(3, 3).parameters())
    torch.save({**contents, "optimizer": adam.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="not AdamW of this model"):
        pt_file.read(tmp_path / "a.pt")


def test_a_numpy_array_is_data(tmp_path: Path) -> None:
    torch.save(
        {"model": weights_of(SMALL), "config": {"n_head": 2}, "rng_state": np.random.get_state()}, tmp_path / "a.pt"
    )
    assert pt_file.read(tmp_path / "a.pt").config == SMALL
