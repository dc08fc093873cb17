"""Mistakes that GPT-2 trainers make, each seen in the wild, that must not happen here.

Others have their test where their subject is: ranks that train alone and rewound or misaligned data
(`distributed/test_elastic.py`), one rank's random generators for all (`distributed/test_exact_resume.py`), bf16 that is
never chosen (`test_model.py`), a missing batch size (`test_config.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2hpc import config_io
from gpt2hpc.config import ModelConfig
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.model.generate import generate
from gpt2hpc.model.gpt import GPT
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, precision, state
from gpt2hpc.training.optimizer import new_optimizer
from tests import first_calls, tiny

PACKAGE = Path(__file__).parents[2] / "gpt2hpc"
THIRD_GPU = torch.device("cuda:3")


def test_an_indexed_gpu_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device == "cuda"` is False for cuda:3: then TF32 stays off and the GPU's generator is not saved."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index], dtype=torch.uint8))
    try:
        precision.choose("auto", THIRD_GPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    tensors, _ = state.rank_state(THIRD_GPU)
    assert tensors["cuda"].tolist() == [3]
    restored: list[tuple[list[int], torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda found, device: restored.append((found.tolist(), device)))
    state.restore_rank_state(state.rank_state(THIRD_GPU), THIRD_GPU)
    assert restored == [([3], THIRD_GPU)]


@pytest.mark.parametrize(
    ("preset", "tag"),
    [
        ("gpt2-124m", "gpt2-124m-ctx1024"),
        ("gpt2-350m", "gpt2-355m-ctx1024"),
        ("gpt2-774m", "gpt2-774m-ctx1024"),
        ("gpt2-1558m", "gpt2-1558m-ctx1024"),
    ],
)
def test_every_size_can_be_named(preset: str, tag: str) -> None:
    """A table of names fails for a size that is not in it, hours into the run, at the first save."""
    model = config_io.load(config_io.presets()[preset]).model
    assert model.tag == tag
    name = checkpoint.name(started="20260131-120000", tag=tag, step=5)
    assert checkpoint.Checkpoint(Path(name)).step == 5


def test_any_size_can_be_named() -> None:
    assert ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=8).tag == "gpt2-201k-ctx8"


def test_saves_go_where_they_were_asked_to(
    shared_data: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "asked" / "run")
    assert tiny.run_ranks(run, tiny.config(shared_data.where), nproc=1) == 0
    assert tiny.newest(run).step == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked"]


def test_the_learning_rate_goes_on(shared_data: Manifest, tmp_path: Path) -> None:
    settings = tiny.config(shared_data.where)
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    assert tiny.run_ranks(whole, settings, nproc=1) == 0
    assert tiny.run_ranks(cut, settings, nproc=1, options=["--signal", "5", "0"]) == 0
    assert tiny.run_ranks(cut, settings, nproc=1, restart=1) == 0
    rates = [
        [line.split('"lr": ')[1].split(",")[0] for line in run.metrics.read_text().splitlines() if '"lr"' in line]
        for run in (whole, cut)
    ]
    assert len(rates[0]) == 12
    assert rates[0] == rates[1]


def test_nothing_is_unpickled() -> None:
    """A checkpoint from elsewhere must never be able to run code."""
    loads = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "save"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load"):
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert words.get("weights_only") == "True", path
                loads.append(path.name)
    assert loads == ["pt_file.py"], "the one place that reads what others have pickled"


def functions_called(work: Callable[[], object]) -> set[str]:
    """Names of torch's functions that run, `aten::exp_` as `exp`."""
    with torch.profiler.profile() as profiled:
        work()
    return {event.key.removeprefix("aten::").removesuffix("_") for event in profiled.key_averages()}


def test_no_first_call_changes_the_bits() -> None:
    """A restarted process makes its first calls anew: one that may be wrong would end bit-identical continuation."""
    settings = tiny.config("unused")
    model = GPT(settings.model)
    optimizer, tokens = new_optimizer(model, settings.optimizer), torch.randint(0, tiny.VOCAB, (2, 16))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def steps() -> None:
        for _ in range(2):
            scaler.scale(model(tokens, tokens)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        list(generate(model, [1], max_tokens=2, top_k=5))

    called = functions_called(steps)
    assert {"gelu", "_fused_adamw", "softmax", "linalg_vector_norm"} <= called
    assert called & set(first_calls.NAMES) == set()
    assert functions_called(lambda: torch.ones(4).exp_()) & set(first_calls.NAMES) == {"exp"}
