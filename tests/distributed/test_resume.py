"""Where a run goes on from: the Hub, another run, a file of another project, or nowhere; real runs against a Hub on loopback."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2hpc import config_io
from gpt2hpc.config import Config
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.model.gpt import GPT
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, resume
from tests import tiny
from tests.hub_server import HubServer, serving
from tests.tiny import gpt2hpc

REPO = "user/mine"
FOLDER = "checkpoints/"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def settings(shared_data: Manifest) -> Config:
    return tiny.config(shared_data.where)


@pytest.fixture(scope="module")
def undisturbed(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("undisturbed") / "run")
    train(run, settings, keep_last=9)
    return run


def train(
    run: RunDir, settings: Config, *more: str, code: int = 0, env: dict[str, str] | None = None, **saving: object
) -> str:
    """`gpt2hpc train` with two ranks; what it said."""
    changed = saved(settings, **saving)
    words = [word for word in tiny.flags(changed) if not word.endswith("=null")]
    done = gpt2hpc("train", "--run-dir", run.path, "--nproc", "2", *words, *more, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def saved(settings: Config, **saving: object) -> Config:
    return dataclasses.replace(settings, checkpoint=dataclasses.replace(settings.checkpoint, **saving))  # type: ignore[arg-type]


def train_until_8(
    run: RunDir, settings: Config, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], **saving: object
) -> None:
    """A rank is told to stop in step 7; all save at step 8."""
    with monkeypatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        options = ["--signal", "7", "0"]
        assert tiny.run_ranks(run, saved(settings, **saving), nproc=2, options=options) == 0
    assert tiny.newest(run).step == 8


def names(hub: HubServer) -> list[int]:
    """Steps of the checkpoints that the repository shows."""
    folders = {path.split("/")[1] for path in hub.files(REPO, kind="model") if path.startswith(FOLDER)}
    return sorted(checkpoint.Checkpoint(Path(name)).step for name in folders)


def content(run: RunDir) -> dict[str, object]:
    return tiny.content(tiny.newest(run))


# The Hub ------------------------------------------------------------------------------------------------------------


def test_uploaded_beside_and_resumed_on_an_empty_disk(
    hub: HubServer, settings: Config, undisturbed: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through 429s, a dropped connection and errors; then another cluster, that has nothing but the repository."""
    env = hub.environment("hf_write")
    hub.faults.rate_limit("POST .*preupload", 2, 1)
    hub.faults.drop("PUT /lfs", 1, 0, reset=True)
    hub.faults.error("POST .*commit", 1, 503)
    first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "elsewhere" / "second")
    train_until_8(first, settings, monkeypatch, env, repo=REPO)
    done = gpt2hpc("sync", first.path, env=env)  # at a stop the last one is left to the next attempt, or to this
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.faults.unspent() == []
    assert hub.repo(REPO, kind="model").private
    assert names(hub)[-1] == 8
    commits = [commit.title for commit in hub.repo(REPO, kind="model").commits]
    assert len([title for title in commits if title.startswith("Step ")]) == len(names(hub)), "one commit a checkpoint"
    shutil.rmtree(first.path)
    told = train(second, settings, env=env, repo=REPO)
    assert "resuming at step 8" in told
    assert content(second) == content(undisturbed)
    assert tiny.losses(second) == tiny.losses(undisturbed), "the curve begins where the first one did"
    assert json.loads(second.metrics.read_text().splitlines()[0])["step"] <= 1
    assert names(hub)[-1] == 12
    assert len({path.name.split("_step")[0] for path in second.checkpoints.iterdir()}) == 1, "it is the same run"


def test_the_further_one_wins_unless_it_is_damaged(
    hub: HubServer, settings: Config, undisturbed: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, run = hub.environment("hf_write"), RunDir(tmp_path / "run")
    train_until_8(run, settings, monkeypatch, env, repo=REPO)
    assert gpt2hpc("sync", run.path, env=env).returncode == 0
    shutil.rmtree(tiny.newest(run).path)
    other = tiny.copy_run(run, tmp_path / "other")
    told = train(run, settings, env=env, repo=REPO)
    assert "resuming at step 8" in told
    assert content(run) == content(undisturbed)
    files = hub.files(REPO, kind="model")
    wrong = {path: b"not what it was" for path in files if "/state" in path and "0006/" not in path}
    hub.commit(REPO, wrong, kind="model")
    told = train(other, settings, env=env, repo=REPO)
    damaged = {path.split("/")[1] for path in wrong if Path(path).parent.name[-2:] > "06"}
    assert told.count("skipping the checkpoint hf://user/mine/checkpoints/") == len(damaged) > 1
    assert "resuming at step 6" in told, "what is damaged there is no reason to lose what is here"
    assert content(other) == content(undisturbed)


@pytest.mark.parametrize("how", ["down", "offline"])
def test_without_a_hub_training_finishes_and_the_queue_is_uploaded_later(
    how: str, hub: HubServer, settings: Config, undisturbed: RunDir, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    env = hub.environment("hf_write")
    if how == "down":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            env["HF_ENDPOINT"] = f"http://127.0.0.1:{unused.getsockname()[1]}"
            told = train(run, settings, env=env, repo=REPO, upload_wait_s=3)
    else:
        told = train(run, settings, env={**env, "HF_HUB_OFFLINE": "1"}, repo=REPO, upload_wait_s=3)
    assert f"`gpt2hpc sync {run.path}`" in told
    assert run.finished.exists()
    assert content(run) == content(undisturbed)
    done = gpt2hpc("status", run.path)
    assert f"4 to upload to {REPO}, nothing there yet" in done.stdout
    done = gpt2hpc("sync", run.path, env=hub.environment("hf_write"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert names(hub) == [3, 6, 9, 12]
    assert f"all on {REPO}" in gpt2hpc("status", run.path).stdout


@pytest.mark.parametrize(
    ("token", "told"),
    [("hf_wrong", "the Hub does not know this token"), ("hf_read", "is a read token"), (None, "no token here")],
)
def test_a_token_that_cannot_write_is_refused_before_anything_is_done(
    token: str | None, told: str, hub: HubServer, settings: Config, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    error = train(run, settings, env=hub.environment(token), repo=REPO, code=8)
    assert error.count("\n") == 1
    assert told in error
    assert not run.path.exists()


def test_the_check_leaves_nothing_in_the_repository(hub: HubServer, settings: Config, tmp_path: Path) -> None:
    hub.add_repo(REPO, {"README.md": b"mine"}, kind="model")
    before = len(hub.repo(REPO, kind="model").commits)
    done = gpt2hpc("doctor", "--hub", REPO, env=hub.environment("hf_write"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(hub.repo(REPO, kind="model").commits) == before


def test_checkpoints_that_do_not_come_are_no_reason_to_begin_anew(
    hub: HubServer, settings: Config, tmp_path: Path
) -> None:
    """On an empty disk: else the run that the Hub knows would be forgotten."""
    env, first, second = hub.environment("hf_write"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(first, settings, "--train.total_steps", "4", env=env, repo=REPO)
    files = hub.files(REPO, kind="model")
    hub.commit(REPO, {path: b"not what it was" for path in files if "/state" in path}, kind="model")
    error = train(second, settings, "--train.total_steps", "4", env=env, repo=REPO, code=4)
    assert "checkpoints to go on from, and none came whole" in error
    assert not second.has_checkpoints


def test_without_its_checkpoints_and_the_hub_a_run_does_not_begin_anew(
    hub: HubServer, settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger knows that it has saved something, which may be on the Hub."""
    env, run = hub.environment("hf_write"), RunDir(tmp_path / "run")
    train_until_8(run, settings, monkeypatch, env, repo=REPO)
    for path in run.checkpoints.iterdir():
        shutil.rmtree(path)
    error = train(run, settings, env={**env, "HF_HUB_OFFLINE": "1"}, repo=REPO, code=9)
    assert "holds nothing whole, though this run has saved something" in error


def test_a_run_that_was_pulled_and_continued_is_the_same_run(
    hub: HubServer, settings: Config, undisturbed: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first disk goes on from what the second has uploaded since, and neither begins anew without its checkpoints."""
    env, first, second = hub.environment("hf_write"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train_until_8(first, settings, monkeypatch, env, repo=REPO)
    assert gpt2hpc("sync", first.path, env=env).returncode == 0
    assert gpt2hpc("sync", second.path, "--pull", "--repo", REPO, env=env).returncode == 0
    train(second, settings, "--train.total_steps", "11", env=env, repo=REPO)
    assert resume.identity(first) == resume.identity(second)
    assert "resuming at step 11" in train(first, settings, env=env, repo=REPO)
    for path in first.checkpoints.iterdir():
        shutil.rmtree(path)
    hub.commit(REPO, dict.fromkeys(hub.files(REPO, kind="model")), kind="model")
    error = train(first, settings, "--train.total_steps", "13", env=env, repo=REPO, code=9)
    assert "which holds nothing of this run" in error


def test_a_busy_hub_is_no_reason_to_begin_anew(hub: HubServer, settings: Config, tmp_path: Path) -> None:
    """On an empty disk it is asked again for minutes, and then the attempt ends, to be restarted."""
    env, first, second = hub.environment("hf_write"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(first, settings, "--train.total_steps", "4", env=env, repo=REPO)
    hub.faults.rate_limit("GET .*auth-check", 6, retry_after_s=300)
    assert "resuming at step 4" in train(second, settings, "--train.total_steps", "5", env=env, repo=REPO)
    assert hub.faults.unspent() == []
    third = RunDir(tmp_path / "third")
    third.create()
    hub.faults.rate_limit("GET .*auth-check", 99, retry_after_s=300)
    program = (
        "import sys; from gpt2hpc.run_dir import RunDir; from gpt2hpc.training import resume; from gpt2hpc import cli, config_io; "
        "from pathlib import Path; resume.WAITS_S = (0.1,); run = RunDir(Path(sys.argv[1])); "
        "sys.exit(cli.run(lambda argv: resume.find(run, config_io.load(run.config), say=print)))"
    )
    config_io.store(saved(settings, repo=REPO), third.config)
    command = [sys.executable, "-c", program, str(third.path)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 6
    assert "nothing is here to go on from, and hf://user/mine, which may hold a checkpoint, fails now" in done.stderr


def test_a_listing_that_is_refused_is_no_reason_to_end_a_run_that_has_checkpoints(
    hub: HubServer, settings: Config, tmp_path: Path
) -> None:
    env, run = hub.environment("hf_write"), RunDir(tmp_path / "run")
    train(run, settings, "--train.total_steps", "4", env=env, repo=REPO)
    hub.faults.error("GET .*/tree/", 1, 400)
    told = train(run, settings, "--train.total_steps", "5", env=env, repo=REPO)
    assert "warning: hf://user/mine is not reached: " in told
    assert "resuming at step 4" in told


def test_two_runs_in_one_repository_stay_apart(
    hub: HubServer, settings: Config, undisturbed: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, first, second = hub.environment("hf_write"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(first, settings, env=env, repo=REPO)
    train_until_8(second, settings, monkeypatch, env, repo=REPO, resume="none")
    assert gpt2hpc("sync", second.path, env=env).returncode == 0
    for path in second.checkpoints.iterdir():
        shutil.rmtree(path)
    told = train(second, settings, "--resume", "auto", env=env, repo=REPO)
    assert "resuming at step 8" in told, "its own, though the other run's step 12 is there"
    assert content(second) == content(undisturbed)


# Named --------------------------------------------------------------------------------------------------------------


def test_from_a_step_on_the_hub(hub: HubServer, settings: Config, undisturbed: RunDir, tmp_path: Path) -> None:
    env, first, second = hub.environment("hf_write"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(first, settings, env=env, repo=REPO)
    told = train(second, settings, "--resume", f"hf://{REPO}@6", env=env)
    assert "resuming at step 6" in told
    assert content(second) == content(undisturbed)
    assert not second.fetched.exists()
    error = train(RunDir(tmp_path / "third"), settings, "--resume", f"hf://{REPO}@7", env=env, code=4)
    assert "has the steps 12, 9, 6, 3" in error


def test_from_another_run(settings: Config, undisturbed: RunDir, tmp_path: Path) -> None:
    third = checkpoint.found(undisturbed.checkpoints)[-1]
    run = RunDir(tmp_path / "run")
    told = train(run, settings, "--resume", str(third.path))
    assert f"resuming at step {third.step}" in told
    assert content(run) == content(undisturbed)
    # The same command again goes on from its own checkpoints; another wish is refused.
    told = train(run, settings, "--resume", str(third.path), "--train.total_steps", "13")
    assert "resuming at step 12" in told
    error = train(run, settings, "--resume", "none", code=3)
    assert "has checkpoints of its own, from which it goes on" in error


@pytest.mark.parametrize("option", ["--resume", "--init"])
def test_what_does_not_exist_is_said_at_once(option: str, settings: Config, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    error = train(run, settings, option, "runs/nowhere", code=3)
    assert f"{option}=runs/nowhere does not exist" in error
    assert not run.path.exists()


def test_from_nothing(hub: HubServer, settings: Config, tmp_path: Path) -> None:
    env, first, second = hub.environment("hf_write"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(first, settings, "--train.total_steps", "4", env=env, repo=REPO)
    told = train(second, settings, "--resume", "none", "--train.total_steps", "4", env=env, repo=REPO)
    assert "starting at step 0" in told


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"n_layer": 3}, ["model.n_layer=3 (the checkpoint has 2)"]),
        ({"n_embd": 64, "block_size": 8}, ["model.n_embd=64", "model.block_size=8 (the checkpoint has 16)"]),
        ({"vocab_size": 300, "padded_vocab_size": 384}, ["model.vocab_size=300", "model.padded_vocab_size=384"]),
    ],
)
def test_another_model_is_refused_by_its_settings(
    other: dict[str, int], told: list[str], settings: Config, undisturbed: RunDir, tmp_path: Path
) -> None:
    changed = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **other))
    run = RunDir(tmp_path / "run")
    error = train(run, changed, "--resume", str(undisturbed.path), code=3)
    assert all(each in error for each in told), error
    assert not run.has_checkpoints


def test_other_data_is_refused(settings: Config, undisturbed: RunDir, tmp_path: Path) -> None:
    tiny.make_data(tmp_path / "data", seed=7)
    changed = dataclasses.replace(settings, data=dataclasses.replace(settings.data, dir=str(tmp_path / "data")))
    error = train(RunDir(tmp_path / "run"), changed, "--resume", str(undisturbed.path), code=3)
    assert "data.manifest_sha256=" in error


def test_another_model_on_the_hub_is_refused_before_it_is_fetched(
    hub: HubServer, settings: Config, tmp_path: Path
) -> None:
    env, first, second = hub.environment("hf_write"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(first, settings, "--train.total_steps", "4", env=env, repo=REPO)
    deeper = dataclasses.replace(settings, model=dataclasses.replace(settings.model, n_layer=3))
    before = len(hub.requests)
    error = train(second, deeper, env=env, repo=REPO, code=3)
    assert "model.n_layer=3 (the checkpoint has 2)" in error
    assert not [line for line in hub.requests[before:] if "resolve" in line and "safetensors" in line]
    assert not second.has_checkpoints
    assert "starting at step 0" in train(
        second, deeper, "--resume", "none", "--train.total_steps", "4", env=env, repo=REPO
    )


def test_a_pt_file_of_another_project(settings: Config, tmp_path: Path) -> None:
    """Weights, AdamW's moments, the step and the loss scale go on; prefixes of compile and DDP do not matter."""
    torch.manual_seed(5)
    model = GPT(settings.model)
    named = dict(model.named_parameters())
    decay = [name for name in named if named[name].dim() >= 2] + [name for name in named if named[name].dim() < 2]
    moments = {
        number: {"step": torch.tensor(4.0), "exp_avg": named[name] * 0.1, "exp_avg_sq": named[name] ** 2}
        for number, name in enumerate(decay)
    }
    split = sum(named[name].dim() >= 2 for name in named)
    groups = [{"params": list(range(split))}, {"params": list(range(split, len(decay)))}]
    weights = {f"module._orig_mod.transformer.{name}": parameter.detach() for name, parameter in named.items()}
    file = tmp_path / "model_00004.pt"
    torch.save(
        {
            "model": {**weights, "module._orig_mod.lm_head.weight": named["wte.weight"].detach()},
            "optimizer": {"state": moments, "param_groups": groups},
            "config": {"n_head": 2, "n_layer": 2, "n_embd": 32, "block_size": 16, "vocab_size": 256},
            "step": 4,
            "val_loss": 5.5,
            "scaler": {},
        },
        file,
    )
    run = RunDir(tmp_path / "run")
    told = train(run, settings, "--resume", str(file), "--train.total_steps", "5", "--checkpoint.every_steps", "1")
    assert "resuming at step 4" in told
    assert {tensor.item() for _, tensor in tiny.newest(run).tensors("optimizer/step/")} == {5}
    loaded = dict(tiny.newest(run).tensors("model/"))
    moved = max((loaded[f"model/{name}"] - named[name]).abs().max().item() for name in named)
    assert 0 < moved < 0.1, "one step away from the file's weights"
    deeper = dataclasses.replace(settings, model=dataclasses.replace(settings.model, n_layer=3))
    error = train(RunDir(tmp_path / "other"), deeper, "--resume", str(file), code=3)
    assert "model.n_layer=3 but 2 there" in error


def test_weights_to_begin_with(settings: Config, undisturbed: RunDir, tmp_path: Path) -> None:
    """Only the weights: the step is 0 and the optimizer fresh; every rank begins with the same ones."""
    run = RunDir(tmp_path / "run")
    told = train(run, settings, "--init", str(undisturbed.path), "--train.total_steps", "3")
    assert "starting at step 0" in told
    assert str(undisturbed.path) in told
    began, ended = tiny.losses(undisturbed, "val")[12], tiny.losses(run, "val")[0]
    assert ended == pytest.approx(began, abs=1e-5)
    longer = dataclasses.replace(settings, model=dataclasses.replace(settings.model, block_size=32))
    error = train(RunDir(tmp_path / "longer"), longer, "--init", str(undisturbed.path), code=3)
    assert "model.block_size=32 is more than the 16 positions" in error
