"""The Hub as a source, as a place for shards and as what trains stream from: the real client against a server that fails."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import catalog, manifest, plan
from gpt2hpc.run_dir import RunDir
from tests import questions, tiny
from tests.hub_server import HubServer, serving
from tests.published import directory_of
from tests.tiny import gpt2hpc

CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/*}
- config_name: sample
  data_files:
  - {split: train, path: sample/*.parquet}
---
Text.
"""
TEXTS = [f"Document {number}, of which there are many.\n" * 4 for number in range(120)]


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), buffer, row_group_size=10)
    return buffer.getvalue()


def jsonl(count: int) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:count]).encode()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server


@pytest.fixture
def dataset(hub: HubServer) -> str:
    """A dataset whose sample is two of its files."""
    files = {f"sample/{number}.parquet": parquet(TEXTS[60 * number : 60 * number + 60]) for number in range(2)}
    hub.add_repo("some/text", {"README.md": CARD, **files, "data/all.jsonl": jsonl(40)})
    return "some/text"


def run(hub: HubServer, *words: str | Path, token: str | None = None, code: int = 0, **env: str) -> str:
    done = gpt2hpc(*words, env={**hub.environment(token), **env})
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stderr if code else done.stdout


def local_result(folder: Path, texts: list[str] = TEXTS) -> Path:
    (folder / "local").mkdir()
    for number in range(2):
        (folder / "local" / f"{number}.parquet").write_bytes(parquet(texts[60 * number : 60 * number + 60]))
    done = gpt2hpc("prepare", "--source", folder / "local", "--out", folder / "expected", "--unit-tokens", "500")
    assert done.returncode == 0, done.stderr
    return folder / "expected"


def shards_of(directory: Path) -> list[tuple[str, str | None]]:
    return [(shard.file, shard.sha256) for shard in catalog.load(str(directory)).shards]


# As a source --------------------------------------------------------------------------------------------------------


def test_a_dataset_is_prepared_through_failures(hub: HubServer, dataset: str, tmp_path: Path) -> None:
    """And the files are deleted as soon as their units are done, so that a small disk suffices."""
    out = tmp_path / "out"
    words = ("prepare", "--source", dataset, "--config", "sample", "--out", out, "--unit-tokens", "500")
    run(hub, *words, "--step", "plan")
    hub.faults.rate_limit("GET .*resolve.*parquet", 1, 1)
    hub.faults.drop("GET .*resolve.*parquet", 2, 500)
    hub.faults.error("GET .*resolve.*1.parquet", 1, 503)
    hub.faults.corrupt("GET .*resolve.*0.parquet$", 1)
    run(hub, *words, "--step", "encode")  # which reads whole files alone
    assert hub.faults.unspent() == []
    assert shards_of(out) == shards_of(local_result(tmp_path))
    assert [path for path in (out / "downloads").rglob("*") if path.is_file()] == []
    facts = json.loads((out / "manifest.json").read_text())["plan"]
    assert facts["sources"] == [dataset]
    assert facts["commits"] == {dataset: hub.repo(dataset).commits[-1].sha}


def test_a_stop_waits_for_no_download(hub: HubServer, dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--source", dataset, "--config", "sample", "--out", str(out), "--unit-tokens", "500")
    run(hub, "prepare", *words, "--step", "plan")
    hub.faults.rate_limit("GET .*resolve.*parquet", 1, 60)
    command = [sys.executable, "-m", "gpt2hpc", "prepare", *words, "--step", "encode"]
    environment = {**os.environ, **hub.environment()}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while hub.faults.unspent():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR2)
            told = time.monotonic()
            _, error = process.communicate(timeout=100)
            took_s = time.monotonic() - told
        finally:
            process.kill()
    assert process.returncode == 6, error
    assert error.splitlines()[-1].endswith("it does the others alone")
    assert took_s < 20
    assert list(out.rglob(".*.tmp")) == []


def test_the_plan_stays_at_its_commit(hub: HubServer, dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("prepare", "--source", dataset, "--config", "sample", "--out", out, "--unit-tokens", "500")
    run(hub, *words, "--step", "plan")
    hub.commit(dataset, {"sample/0.parquet": parquet(["other"] * 60), "sample/2.parquet": parquet(["more"])})
    run(hub, *words)
    assert shards_of(out) == shards_of(local_result(tmp_path))


def test_what_is_not_parquet_is_read_too(hub: HubServer, dataset: str, tmp_path: Path) -> None:
    run(hub, "prepare", "--source", f"hf://datasets/{dataset}", "--out", tmp_path / "out", "--val-fraction", "0.5")
    found = catalog.load(str(tmp_path / "out"))
    assert (found.documents("train") or 0) + (found.documents("val") or 0) == 40


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["some/nothing"], "hf://datasets/some/nothing is not on the Hub, or is private"),
        (["some/text", "--config", "sampel"], "name its configuration with --config"),
        (["some/text", "--config", "sample", "--split", "test"], "has no split 'test' but train"),
        (["some/text", "--revision", "v9"], "has no such revision"),
    ],
)
def test_what_the_hub_lacks_is_said(hub: HubServer, dataset: str, words: list[str], told: str, tmp_path: Path) -> None:
    error = run(hub, "prepare", "--out", tmp_path / "out", "--source", *words, code=4)
    assert told in error
    assert error.count("\n") == 1


def test_offline_is_said(hub: HubServer, dataset: str, tmp_path: Path) -> None:
    error = run(hub, "prepare", "--out", tmp_path / "out", "--source", dataset, code=4, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set: fetch it with `gpt2hpc stage`" in error
    assert hub.requests == []


# As a place for shards ----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    tiny.make_data(tmp_path / "prepared")
    return tmp_path / "prepared"


def test_data_is_pushed_verified_and_not_twice(hub: HubServer, prepared: Path) -> None:
    hub.faults.error("POST .*/commit/", 1, 503)
    hub.faults.drop("POST .*/commit/", 1, 0)  # committed, and the answer lost
    told = run(hub, "push-data", prepared, "--repo", "me/tokens", token="hf_write")
    found = catalog.load(str(prepared))
    files = hub.files("me/tokens")
    assert {name for name in files if not name.startswith(".")} == {
        "README.md",
        manifest.NAME,
        *(shard.file for shard in found.shards),
    }
    assert hub.repo("me/tokens").private
    card = files["README.md"].decode()
    for shard in found.shards:
        assert files[shard.file] == (prepared / shard.file).read_bytes()
        assert f"| {shard.file} | {shard.tokens:,} | {shard.bytes:,} | `{shard.sha256}` |" in card
    assert f"| train | 3 | {found.tokens('train'):,} | 3 |" in card
    assert "every shard's hash agrees" in told
    before = len(hub.requests)
    assert "4 shards there already" in run(hub, "push-data", prepared, "--repo", "me/tokens", token="hf_write")
    assert not [line for line in hub.requests[before:] if line.startswith("PUT")]


def test_an_interrupted_push_goes_on(hub: HubServer, prepared: Path) -> None:
    found = catalog.load(str(prepared))
    first = {shard.file: (prepared / shard.file).read_bytes() for shard in found.shards[:2]}
    hub.add_repo("me/tokens", first)
    assert "2 shards there already" in run(hub, "push-data", prepared, "--repo", "me/tokens", token="hf_write")
    assert catalog_of(hub, "me/tokens") == found.sha256


def catalog_of(hub: HubServer, repo: str) -> str:
    return str(json.loads(hub.files(repo)[manifest.NAME])["sha256"])


def test_a_push_that_cannot_be_is_said_and_leaves_nothing(hub: HubServer, prepared: Path, tmp_path: Path) -> None:
    assert "is refused by the Hub (403)" in run(hub, "push-data", prepared, "--repo", "me/a", token="hf_read", code=4)
    assert "is refused by the Hub (401)" in run(hub, "push-data", prepared, "--repo", "me/a", token="hf_wrong", code=4)
    damaged = shutil.copytree(prepared, tmp_path / "damaged")
    flip(damaged / "train_000001.npy")
    error = run(hub, "push-data", damaged, "--repo", "me/a", token="hf_write", code=4)
    assert "train_000001.npy has sha256" in error
    assert not [line for line in hub.requests if line.startswith("PUT")]
    tiny.make_data(tmp_path / "other", seed=1)
    run(hub, "push-data", prepared, "--repo", "me/a", token="hf_write")
    error = run(hub, "push-data", tmp_path / "other", "--repo", "me/a", token="hf_write", code=4)
    assert "holds other data already" in error


def flip(path: Path, at: int = 1000) -> None:
    contents = bytearray(path.read_bytes())
    contents[at] ^= 1
    path.write_bytes(contents)


# Streamed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(hub: HubServer, shared_data: manifest.Manifest) -> str:
    folder = Path(shared_data.where)
    hub.add_repo("me/tokens", {path.name: path.read_bytes() for path in folder.iterdir()})
    return "hf://datasets/me/tokens"


def train(hub: HubServer, out: RunDir, where: str, *more: str, code: int = 0) -> str:
    settings = tiny.flags(tiny.config(where))
    cache = f"--data.cache_dir={out.path.parent / 'cache'}"
    return run(hub, "train", "--run-dir", out.path, "--nproc", "2", *settings, cache, *more, code=code)


def train_hastily(hub: HubServer, out: RunDir, where: str, *more: str) -> subprocess.CompletedProcess[str]:
    """One rank, as of a launcher, that asks the Hub for seconds only."""
    hasty = "import gpt2hpc.data.patience as p; p.TRIES = 2; p.FIRST_WAIT_S = 0.1; "
    program = f"{hasty}import sys; from gpt2hpc.__main__ import console; sys.exit(console())"
    settings, cache = tiny.flags(tiny.config(where)), f"--data.cache_dir={out.path.parent / 'cache'}"
    command = [sys.executable, "-c", program, "train", "--run-dir", str(out.path), *settings, cache, *more]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment = {**dict(os.environ), **hub.environment(), **rank}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_a_stream_trains_as_the_directory_does(
    hub: HubServer, pushed: str, shared_data: manifest.Manifest, tmp_path: Path
) -> None:
    """Through 429s, dropped connections, a corrupted byte and a repository that changes; each shard is fetched by one process."""
    plainly, streamed = RunDir(tmp_path / "plain"), RunDir(tmp_path / "streamed")
    for steps in ("6", "12"):
        train(hub, plainly, shared_data.where, "--steps", steps)
    hub.faults.rate_limit("GET .*resolve.*npy", 1, 1)
    hub.faults.drop("GET .*resolve.*npy", 2, 300)
    hub.faults.corrupt("GET .*resolve.*npy", 1)
    hub.requests.clear()
    train(hub, streamed, pushed, "--steps", "6")
    assert hub.faults.unspent() == []
    fetched = [line for line in hub.requests if line.startswith("GET") and "resolve" in line and ".npy" in line]
    assert len(fetched) <= len(shared_data.shards) + 4, "a shard, and once more for each failure"
    pinned = hub.repo("me/tokens").commits[-1].sha
    assert f"{pushed}@{pinned}" in streamed.config.read_text()
    other = np.zeros(5000, dtype=np.uint16)
    np.save(tmp_path / "other.npy", other)
    hub.commit("me/tokens", {"train_000001.npy": (tmp_path / "other.npy").read_bytes(), manifest.NAME: b"{}"})
    shutil.rmtree(tmp_path / "cache")  # a fresh node
    train(hub, streamed, pushed, "--steps", "12")
    assert tiny.content(tiny.newest(streamed))["files"] == tiny.content(tiny.newest(plainly))["files"]


def test_a_commit_that_is_gone_is_said(hub: HubServer, pushed: str, tmp_path: Path) -> None:
    error = train(hub, RunDir(tmp_path / "run"), f"{pushed}@{'0' * 40}", code=4)
    assert "has no such revision" in error.splitlines()[-1]


def test_bytes_that_stay_wrong_end_the_run(hub: HubServer, pushed: str, tmp_path: Path) -> None:
    """No step is taken on them."""
    hub.faults.corrupt("GET .*resolve.*train_000003", 99)
    done = train_hastily(hub, RunDir(tmp_path / "run"), pushed)
    assert "what came has sha256" in done.stderr
    assert done.returncode == 4, done.stderr


def test_a_hub_that_is_down_for_long_ends_an_attempt_alone(hub: HubServer, pushed: str, tmp_path: Path) -> None:
    """Of a run that has saved something: the job that it is starts again."""
    run = RunDir(tmp_path / "run")
    train(hub, run, pushed, "--steps", "6")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    hub.faults.error("GET .*resolve.*npy", 999, 503)
    done = train_hastily(hub, run, pushed, "--steps", "12", "--data.patience_s", "2")
    assert done.returncode == 6, done.stderr
    assert "did not come within data.patience_s=2 seconds (hf://datasets/me/tokens@" in done.stderr.splitlines()[-1]
    assert Ledger(run).attempts()[-1].cause is None


def test_shards_of_others_are_streamed(hub: HubServer, tmp_path: Path) -> None:
    source, files = np.random.default_rng(0), {}
    for name, count in {"edufineweb_val_000000": 600, "edufineweb_train_000001": 9000}.items():
        buffer = io.BytesIO()
        np.save(buffer, source.integers(0, tiny.VOCAB, size=count, dtype=np.uint16))
        files[f"{name}.npy"] = buffer.getvalue()
    hub.add_repo("a/seed", files)
    out = RunDir(tmp_path / "run")
    settings = tiny.flags(tiny.config("hf://datasets/a/seed"))
    run(
        hub,
        "train",
        "--run-dir",
        out.path,
        *settings,
        f"--data.cache_dir={tmp_path / 'c'}",
        "--steps=3",
        "--model.vocab_size=50257",
        "--model.padded_vocab_size=50304",
    )
    assert out.finished.exists()


# Staged, for nodes without a network --------------------------------------------------------------------------------


LOOPBACK_ONLY = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))  # as on any node
assert socket.if_nameindex() == [(1, "lo")], socket.if_nameindex()
os.execv(sys.executable, [sys.executable, "-m", "gpt2hpc", *sys.argv[1:]])
"""


def without_network(hub: HubServer, *words: str | Path) -> subprocess.CompletedProcess[str]:
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        reason = "no network namespace can be made here (root, CAP_SYS_ADMIN)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    environment = {**os.environ, **hub.environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["unshare", "-n", sys.executable, "-c", LOOPBACK_ONLY, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_an_interrupt_of_stage_waits_for_no_download_and_what_is_there_is_not_fetched_again(
    hub: HubServer, dataset: str, tmp_path: Path
) -> None:
    """The first of two files asks for a minute's patience; the second is there."""
    words = ("stage", "--source", dataset, "--config", "sample", "--out", str(tmp_path / "staged"))
    hub.faults.rate_limit("GET .*resolve.*0.parquet", 1, 60)
    environment = {**os.environ, **hub.environment()}
    command = [sys.executable, "-m", "gpt2hpc", *words]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while hub.faults.unspent() or not list((tmp_path / "staged").rglob("1.parquet")):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            told = time.monotonic()
            process.communicate(timeout=100)
            took_s = time.monotonic() - told
        finally:
            process.kill()
    assert (process.returncode, took_s < 20) == (6, True)
    assert list((tmp_path / "staged").rglob(".*.tmp")) == []
    hub.requests.clear()
    run(hub, *words)
    fetched = [line for line in hub.requests if line.startswith("GET") and "resolve" in line and "parquet" in line]
    assert {line.rpartition("/")[2].split(".")[0] for line in fetched} == {"0"}


def test_staged_files_are_all_that_a_node_without_network_needs(hub: HubServer, dataset: str, tmp_path: Path) -> None:
    """`prepare`, then training with validation, in a network namespace of their own: no interface but loopback."""
    staged, out = tmp_path / "staged", tmp_path / "out"
    run(hub, "stage", "--source", dataset, "--config", "sample", "--out", staged)
    without_network(hub, "prepare", "--source", staged / "datasets" / dataset, "--out", out, "--unit-tokens", "500")
    assert shards_of(out) == shards_of(local_result(tmp_path))
    small = ["--preset=smoke", "--model.n_layer=1", "--model.n_head=1", "--model.n_embd=16", "--model.block_size=32"]
    run_dir = RunDir(tmp_path / "run")
    without_network(
        hub,
        "train",
        "--run-dir",
        run_dir.path,
        "--data.dir",
        out,
        *small,
        "--steps=4",
        "--optimizer.warmup_tokens=0",
        "--train.eval_every=2",
        "--device=cpu",
    )
    assert set(tiny.losses(run_dir, "val")) == {0, 2, 4}


def test_hellaswag_needs_no_network_once_it_is_staged(hub: HubServer, tmp_path: Path) -> None:
    rows = [{**each, "label": str(each["label"])} for each in questions.examples(40)]
    staged, table = tmp_path / "staged", pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), table)
    hub.add_repo("Rowan/hellaswag", {"data/validation-00000.parquet": table.getvalue().to_pybytes()})
    assert f"gpt2hpc evaluate RUN --hellaswag {staged}" in run(hub, "stage", "--hellaswag", "--out", staged)
    model = directory_of(tmp_path / "model", ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=128))
    words = ("evaluate", model, "--device", "cpu", "--json", "--nproc", "2")
    from_hub = json.loads(run(hub, *words))
    from_stage = json.loads(without_network(hub, *words, "--hellaswag", staged).stdout)
    assert from_stage["hellaswag_examples"] == 40
    assert {**from_stage, "seconds": 0} == {**from_hub, "seconds": 0}


def test_a_training_asks_the_hub_for_its_examples_once(hub: HubServer, tmp_path: Path) -> None:
    """However often it is restarted: a Hub that is away by then costs nothing, and one that has others changes nothing."""
    rows = [{**each, "label": str(each["label"])} for each in questions.examples(20)]
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), table)
    hub.add_repo("Rowan/hellaswag", {"data/validation-00000.parquet": table.getvalue().to_pybytes()})
    tiny.make_data(tmp_path / "data")
    small = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=16", "--model.block_size=64", "--preset=smoke"]
    words = [*small, "--train.sample_every=null", "--optimizer.warmup_tokens=0", "--train.eval_tokens=512"]
    words += ["--data.dir", str(tmp_path / "data"), "--train.hellaswag", "hf://datasets/Rowan/hellaswag"]
    words += ["--run-dir", str(tmp_path / "run"), "--device=cpu"]
    run(hub, "train", *words, "--steps=2")
    done = gpt2hpc("train", *words, "--steps=4", env={**hub.environment(), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert set(tiny.losses(RunDir(tmp_path / "run"), "hella")) == {2, 4}


def test_staging_is_resumed_and_verified(hub: HubServer, dataset: str, tmp_path: Path) -> None:
    weights = {
        "model.safetensors": b"w" * 5000,
        "config.json": b"{}",
        "pytorch_model.bin": b"unwanted",
        "merges.txt": b"a b",
    }
    hub.add_repo("some/gpt2", weights, kind="model")
    hub.add_repo(
        "Rowan/hellaswag",
        {"data/validation-00000.parquet": parquet(TEXTS[:3]), "data/train-00000.parquet": parquet(TEXTS)},
    )
    hub.add_repo("me/tokens", {"train_000001.npy": b"x" * 300, manifest.NAME: b"{}", "README.md": b""})
    words = (
        "stage",
        "--source",
        dataset,
        "--config",
        "sample",
        "--weights",
        "some/gpt2",
        "--hellaswag",
        "--shards",
        "me/tokens",
    )
    staged = tmp_path / "staged"
    told = run(hub, *words, "--out", staged)
    folder = f"datasets/{dataset}/{hub.repo(dataset).commits[-1].sha[:8]}-sample-train"
    assert f"gpt2hpc prepare --source {staged}/{folder}" in told
    files = {str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()}
    assert files == {
        "stage.json",
        *(f"{folder}/sample/{number}.parquet" for number in range(2)),
        *(f"models/some/gpt2/{name}" for name in ("model.safetensors", "config.json", "merges.txt")),
        "datasets/Rowan/hellaswag/data/validation-00000.parquet",
        "shards/me/tokens/train_000001.npy",
        "shards/me/tokens/manifest.json",
    }
    assert gpt2hpc("verify", staged).returncode == 0
    hub.requests.clear()
    run(hub, *words, "--out", staged)
    assert not [
        line
        for line in hub.requests
        if "model.safetensors" in line or "sample/0.parquet" in line.partition("resolve")[2]
    ]
    hub.commit(dataset, {"sample/0.parquet": parquet(TEXTS[:50])})
    run(hub, *words, "--out", staged)
    several = gpt2hpc("prepare", "--source", staged / "datasets" / dataset, "--out", tmp_path / "out")
    assert "holds several staged datasets; name one" in several.stderr
    flip(staged / "models/some/gpt2/model.safetensors")
    verified = gpt2hpc("verify", staged)
    assert verified.returncode == 4
    assert "model.safetensors has sha256" in verified.stdout


def test_planning_reads_no_more_than_footers(hub: HubServer, tmp_path: Path) -> None:
    texts = [os.urandom(20_000).hex() for _ in range(100)]
    hub.add_repo("some/large", {"a.parquet": parquet(texts)})
    run(hub, "prepare", "--source", "some/large", "--out", tmp_path, "--step", "plan", "--unit-tokens", "100000")
    assert len(plan.load(tmp_path).units) == 10
    size = len(hub.files("some/large")["a.parquet"])
    assert sum(count for line, count in hub.sent if "a.parquet" in line) < size / 2


def test_fineweb_edu_is_its_sample_unless_asked(hub: HubServer, tmp_path: Path) -> None:
    """The dataset's own default is terabytes."""
    card = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""
    files = {"data/CC/0.parquet": parquet(TEXTS), "sample/10BT/000_00000.parquet": parquet(TEXTS[:60])}
    hub.add_repo("HuggingFaceFW/fineweb-edu", {"README.md": card, **files})
    told = run(hub, "prepare", "--source", "HuggingFaceFW/fineweb-edu", "--out", tmp_path / "out", "--dry-run")
    assert "1 file, " in told
    assert "sample/10BT/000_00000.parquet" in told
    assert "data/CC" not in told
