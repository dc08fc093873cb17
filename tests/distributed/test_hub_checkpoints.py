"""Checkpoints to the Hub and back: the real client in processes of its own, against a server that fails, refuses or is away."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc import config_io
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.ledger import Ledger
from gpt2hpc.config import CheckpointConfig, Config
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, resume, uploads
from gpt2hpc.training.checkpoint import Checkpoint
from tests import tiny
from tests.fake_checkpoints import write_checkpoint
from tests.hub_server import HubServer, serving
from tests.tiny import gpt2hpc

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
REPO = "me/model"
HASTY = "import gpt2hpc.data.patience as p, gpt2hpc.training.hub_access as a; p.FIRST_WAIT_S = 0.05; p.TRIES = 3; "


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a repository that keeps two checkpoints, and has saved none."""
    run = RunDir(tmp_path / "run")
    run.create()
    store(run)
    return run


def store(run: RunDir, **settings: Any) -> None:
    config = tiny.config("data")
    chosen = {"repo": REPO, "keep_last": 2, **settings}
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **chosen))
    config_io.store(config, run.config)


def sync(hub: HubServer, run: RunDir, *words: str, code: int = 0, token: str | None = "hf_write", **env: str) -> str:
    """What `gpt2hpc sync` said."""
    done = gpt2hpc("sync", run.path, *words, env={**hub.environment(token), **env})
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def hasty(
    hub: HubServer, program: str, *words: str | Path, token: str = "hf_write"
) -> subprocess.CompletedProcess[str]:
    """A program whose questions are asked three times, with no time between."""
    command = [sys.executable, "-c", HASTY + program, *map(str, words)]
    environment = {**os.environ, **hub.environment(token)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


HASTY_SYNC = "import sys; from gpt2hpc import cli, sync; sys.exit(cli.run(sync.main, sys.argv[1:]))"


def on_hub(hub: HubServer, repo: str = REPO) -> dict[str, dict[str, bytes]]:
    """Files of each checkpoint."""
    found: dict[str, dict[str, bytes]] = {}
    for path, data in hub.files(repo, kind="model").items():
        if path.startswith("checkpoints/"):
            _, name, file = path.split("/")
            found.setdefault(name, {})[file] = data
    return found


def here(found: Checkpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in found.path.iterdir()}


def steps(names: object) -> list[int]:
    return sorted(Checkpoint(Path(str(name))).step for name in names)  # type: ignore[attr-defined]


# Up -----------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_one_commit_through_any_failure(hub: HubServer, run: RunDir) -> None:
    made = write_checkpoint(run, 3)
    hub.add_repo(REPO, {".gitattributes": b""}, kind="model", private=True)
    hub.faults.rate_limit("POST .*/preupload/", 1, retry_after_s=0)
    hub.faults.error("POST .*/objects/batch", 1, 503)
    hub.faults.drop("PUT /lfs/", 1, 0)
    hub.faults.error("POST .*/commit/", 1, 500)
    hub.faults.drop("POST .*/commit/", 1, 0)  # committed, and the answer lost
    said = sync(hub, run)
    assert hub.faults.unspent() == []
    assert on_hub(hub) == {made.path.name: here(made)}
    assert len(hub.repo(REPO, kind="model").commits) == 2
    assert "nothing waits any more" in said
    assert uploads.waiting(run, REPO) == []
    mark = json.loads((run.uploads / f"{made.path.name}.json").read_text())
    assert mark["commit"] == hub.repo(REPO, kind="model").commits[-1].sha
    before = len(hub.requests)
    assert f"all on {REPO}" in sync(hub, run)
    assert len(hub.requests) == before, "nothing is asked when nothing waits"


def test_a_missing_repository_is_created_private(hub: HubServer, run: RunDir) -> None:
    made = write_checkpoint(run, 3)
    sync(hub, run)
    assert hub.repo(REPO, kind="model").private
    assert on_hub(hub) == {made.path.name: here(made)}


def test_the_hub_keeps_what_the_run_keeps(hub: HubServer, run: RunDir) -> None:
    """The furthest goes first; another run's, and what has no manifest, is left alone."""
    store(run, keep_every_steps=9)
    other = write_checkpoint(run, 1, started="20200101-000000")
    incomplete = checkpoint.name(started="20260131-120000", tag="gpt2-tiny-ctx16", step=1)
    files = {f"checkpoints/{other.path.name}/{name}": data for name, data in here(other).items()}
    hub.add_repo(REPO, {**files, f"checkpoints/{incomplete}/state.bin": b"x", "README.md": b"mine"}, kind="model")
    shutil.rmtree(other.path)
    for step in (3, 6):
        write_checkpoint(run, step)
    said = sync(hub, run)
    assert re.findall(r"uploading step (\d+)", said) == ["6", "3"]
    for step in (9, 12, 15):
        write_checkpoint(run, step)
        sync(hub, run)
    assert steps(on_hub(hub)) == [1, 1, 9, 12, 15]
    assert hub.files(REPO, kind="model")["README.md"] == b"mine"
    assert len(hub.repo(REPO, kind="model").commits) == 1 + 5


def test_a_commit_by_someone_else_meanwhile_is_kept(hub: HubServer, run: RunDir) -> None:
    made = write_checkpoint(run, 3)
    hub.add_repo(REPO, {"README.md": b"old"}, kind="model")
    hub.faults.slow("POST .*/commit/", 1, seconds=3)
    with started(hub, run) as process:
        wait_for(lambda: any("/commit/" in line for line in hub.requests))
        hub.commit(REPO, {"README.md": b"new"}, kind="model")
        assert process.wait(60) == 0
    assert on_hub(hub) == {made.path.name: here(made)}
    titles = [commit.title for commit in hub.repo(REPO, kind="model").commits]
    assert titles[1:] == ["a change by someone else", f"Step 3: {made.path.name}"]
    assert len([line for line in hub.requests if "/commit/" in line]) == 2, "refused once, and looked again"


def test_what_did_not_arrive_as_it_is_goes_again(hub: HubServer, run: RunDir) -> None:
    """The Hub's hashes are compared after the commit, not before only."""
    made = write_checkpoint(run, 3)
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.slow(f"GET /api/models/{REPO}$", 2, seconds=3)
    with started(hub, run) as process:
        wait_for(lambda: len(hub.repo(REPO, kind="model").commits) == 2)
        hub.commit(REPO, {f"checkpoints/{made.path.name}/metrics.jsonl": b"other"}, kind="model")
        assert process.wait(60) == 0
    assert hub.faults.unspent() == []
    assert on_hub(hub) == {made.path.name: here(made)}


def test_another_checkpoint_by_the_same_name_replaces_it(hub: HubServer, run: RunDir) -> None:
    """A damaged one was skipped, say, and the step trained again on another machine."""
    made = write_checkpoint(run, 3)
    files = {f"checkpoints/{made.path.name}/{name}": data for name, data in here(made).items()}
    hub.add_repo(REPO, {**files, f"checkpoints/{made.path.name}/more.bin": b"more"}, kind="model")
    again = write_checkpoint(run, 3, seed=1)
    sync(hub, run)
    assert on_hub(hub) == {made.path.name: here(again)}


def test_a_run_that_began_in_the_same_second_is_left_alone(hub: HubServer, run: RunDir, tmp_path: Path) -> None:
    """As the tasks of an array do: the names of their checkpoints are the same, and so would be what retention deletes."""
    other = RunDir(tmp_path / "other")
    other.create()
    store(other)
    theirs = [write_checkpoint(other, step, identity="one") for step in (3, 6)]
    sync(hub, other)
    for step in (6, 9, 12):
        write_checkpoint(run, step, identity="another", seed=1)
    said = sync(hub, run, code=3)
    assert "checkpoints of another run that began in the same second" in said
    assert "--checkpoint.repo of its own" in json.loads((run.uploads / "error.json").read_text())["reason"]
    assert on_hub(hub) == {found.path.name: here(found) for found in theirs}
    write_checkpoint(other, 9, identity="one")
    sync(hub, other)
    assert steps(on_hub(hub)) == [6, 9]


def test_one_that_goes_while_it_is_uploaded_is_no_error(hub: HubServer, run: RunDir) -> None:
    """Its lease was not seen on another node, say."""
    made = write_checkpoint(run, 3)
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.slow(f"GET /api/models/{REPO}$", 1, seconds=3)
    with started(hub, run) as process:
        wait_for(lambda: f"GET /api/models/{REPO}" in hub.requests)
        shutil.rmtree(made.path)
        assert process.wait(60) == 0
    assert on_hub(hub) == {}


def test_a_request_that_stalls_is_given_up(hub: HubServer, run: RunDir) -> None:
    """The client itself would wait for ever."""
    made = write_checkpoint(run, 3)
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.slow("POST .*/commit/", 1, seconds=100)
    began = time.monotonic()
    done = hasty(hub, HASTY_SYNC.replace("; sys.exit", "; p.STALL_S = 2.0; sys.exit"), run.path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert on_hub(hub) == {made.path.name: here(made)}


def test_two_at_once_do_no_harm(hub: HubServer, run: RunDir) -> None:
    for step in (3, 6):
        write_checkpoint(run, step)
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.slow("POST .*/commit/", 2, seconds=1)
    with started(hub, run) as one, started(hub, run) as other:
        assert (one.wait(90), other.wait(90)) == (0, 0)
    assert on_hub(hub) == {found.path.name: here(found) for found in checkpoint.found(run.checkpoints)}
    assert len(hub.repo(REPO, kind="model").commits) == 3
    assert uploads.waiting(run, REPO) == []
    assert not list(run.uploads.glob("*.lease"))


def test_a_killed_sync_goes_on_where_it_was(hub: HubServer, run: RunDir) -> None:
    """What is in large-file storage is not sent again; while it lived, the checkpoint was not to be deleted."""
    made = write_checkpoint(run, 3)
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.slow("POST .*/commit/", 1, seconds=30)
    with started(hub, run) as process:
        wait_for(lambda: any("/commit/" in line for line in hub.requests))
        assert uploads.leased(run) == {made.path}
        process.send_signal(signal.SIGKILL)
    assert on_hub(hub) == {}
    assert [found.step for found in uploads.waiting(run, REPO)] == [3]
    hub.requests.clear()
    hub.faults.clear()
    sync(hub, run)
    assert on_hub(hub) == {made.path.name: here(made)}
    assert [line for line in hub.requests if line.startswith("PUT")] == []


def test_a_server_that_is_away_loses_nothing(hub: HubServer, run: RunDir) -> None:
    """The queue stays, quickly; when the server is back, what is still there goes up, in whichever order it was made."""
    for step in (3, 6):
        write_checkpoint(run, step)
    began = time.monotonic()
    said = sync(hub, run, code=6, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - began < 15
    assert "the Hub is not reached" in said.splitlines()[-1]
    assert "the same command uploads it" in said.splitlines()[-1]
    write_checkpoint(run, 9)
    shutil.rmtree(checkpoint.found(run.checkpoints)[-1].path)
    shown = json.loads(gpt2hpc("status", run.path, "--json").stdout)[0]["uploads"]
    assert (shown["waiting"], shown["uploaded_step"]) == (2, None)
    assert "the Hub is not reached" in shown["error"]
    sync(hub, run)
    assert steps(on_hub(hub)) == [6, 9]
    shown = json.loads(gpt2hpc("status", run.path, "--json").stdout)[0]["uploads"]
    assert shown == {"repo": REPO, "waiting": 0, "uploaded_step": 9, "behind": None, "error": None}
    write_checkpoint(run, 12)
    assert f"1 to upload to {REPO}, step 9 is there, 3 steps behind" in gpt2hpc("status", run.path).stdout


def test_a_server_that_fails_throughout_is_said(hub: HubServer, run: RunDir) -> None:
    write_checkpoint(run, 3)
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.error("POST .*/commit/", 99, 503)
    done = hasty(hub, HASTY_SYNC, run.path)
    assert done.returncode == 6, done.stderr
    assert "cannot be had: " in done.stderr.splitlines()[-1]
    assert "(3 tries)" in done.stderr.splitlines()[-1]
    assert "gpt2hpc stage" not in done.stderr
    assert [found.step for found in uploads.waiting(run, REPO)] == [3]


def test_offline_is_no_error_of_the_network(hub: HubServer, run: RunDir) -> None:
    write_checkpoint(run, 3)
    assert "HF_HUB_OFFLINE is set" in sync(hub, run, code=6, HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_a_damaged_checkpoint_is_skipped_aloud(hub: HubServer, run: RunDir) -> None:
    write_checkpoint(run, 3)
    damaged = write_checkpoint(run, 6)
    (damaged.path / "metrics.jsonl").write_bytes(b"{}")
    said = sync(hub, run, code=4)
    assert f"skipping the damaged checkpoint {damaged.path}: metrics.jsonl has 2 bytes" in said
    assert steps(on_hub(hub)) == [3]


def test_a_damaged_manifest_is_skipped_aloud_too(hub: HubServer, run: RunDir) -> None:
    write_checkpoint(run, 3)
    assert "nothing waits any more" in sync(hub, run)
    damaged = write_checkpoint(run, 6)
    manifest = damaged.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    said = sync(hub, run, code=4)
    assert f"skipping the damaged checkpoint {damaged.path}: its manifest is missing or damaged" in said
    assert steps(on_hub(hub)) == [3]


def test_a_dry_run_asks_nobody(hub: HubServer, run: RunDir) -> None:
    made = write_checkpoint(run, 3)
    said = sync(hub, run, "--dry-run")
    assert f"{made.path.name}  40,012 bytes" in said
    assert f"1 to upload to {REPO}, nothing there yet" in said
    assert hub.requests == []
    assert not run.uploads.exists()


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--repo", REPO]])
def test_what_is_no_run_is_said(hub: HubServer, tmp_path: Path, words: list[str]) -> None:
    assert "is no run directory" in sync(hub, RunDir(tmp_path / "typo"), *words, code=9)


def test_a_run_without_a_repository_names_one(hub: HubServer, run: RunDir) -> None:
    made = write_checkpoint(run, 3)
    store(run, repo=None)
    assert "name the repository with --repo USER/NAME" in sync(hub, run, code=3)
    assert "--repo=model is no model repository; write USER/NAME" in sync(hub, run, "--repo", "model", code=3)
    sync(hub, run, "--repo", "user/other")
    assert on_hub(hub, "user/other") == {made.path.name: here(made)}


def started(hub: HubServer, run: RunDir) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpt2hpc.sync", str(run.path)]
    environment = {**os.environ, **hub.environment("hf_write")}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Down ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path) -> dict[int, Checkpoint]:
    """Two checkpoints on the Hub, and where they came from."""
    source = RunDir(tmp_path / "source")
    source.create()
    made = {step: write_checkpoint(source, step) for step in (3, 6)}
    files = {
        f"checkpoints/{found.path.name}/{name}": data for found in made.values() for name, data in here(found).items()
    }
    hub.add_repo(REPO, files, kind="model", private=True)
    return made


def test_the_furthest_is_pulled_to_an_empty_disk(hub: HubServer, pushed: dict[int, Checkpoint], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "fresh")
    hub.faults.rate_limit("GET .*resolve.*metrics", 1, retry_after_s=0)
    hub.faults.drop("GET .*resolve.*state-00000", 1, 300, reset=True)
    hub.faults.corrupt("GET .*resolve.*state-00001", 1)
    hub.faults.corrupt("GET .*resolve.*manifest", 1)
    said = sync(hub, run, "--pull", "--repo", REPO)
    assert hub.faults.unspent() == []
    (fetched,) = run.checkpoints.iterdir()
    assert here(Checkpoint(fetched)) == here(pushed[6])
    assert f"step 6 is here, as the Hub has it: {fetched}" in said
    said = sync(hub, run, "--pull", "--repo", REPO)
    assert "has no checkpoint that is further than step 6" in said


def test_bytes_that_stay_wrong_are_skipped_for_the_one_before(
    hub: HubServer, pushed: dict[int, Checkpoint], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "fresh")
    hub.faults.corrupt("GET .*resolve.*step0000006/state-00001", 99)
    done = hasty(hub, HASTY_SYNC, run.path, "--pull", "--repo", REPO)
    assert done.returncode == 0, done.stderr
    assert re.search(r"skipping the checkpoint hf://me/model/\S*step0000006: .* has sha256", done.stderr)
    assert [found.step for found in checkpoint.found(run.checkpoints)] == [3]
    hub.faults.corrupt("GET .*resolve.*step0000003/state-00001", 99)
    shutil.rmtree(run.path)
    done = hasty(hub, HASTY_SYNC, run.path, "--pull", "--repo", REPO)
    assert done.returncode == 4
    assert "came whole" in done.stderr.splitlines()[-1]
    assert checkpoint.found(run.checkpoints) == []


def test_one_whose_manifest_tells_of_other_bytes_is_skipped(
    hub: HubServer, pushed: dict[int, Checkpoint], tmp_path: Path
) -> None:
    """As someone's change through the web site would make it: the Hub's own hashes agree."""
    name = f"checkpoints/{pushed[6].path.name}/state-00000-of-00002.safetensors"
    hub.commit(REPO, {name: b"other"}, kind="model")
    run = RunDir(tmp_path / "fresh")
    said = sync(hub, run, "--pull", "--repo", REPO)
    assert "what came is damaged: state-00000-of-00002.safetensors has 5 bytes instead of 20000" in said
    assert [path.name for path in run.checkpoints.iterdir()] == [pushed[3].path.name]


def test_an_interrupted_pull_goes_on(hub: HubServer, pushed: dict[int, Checkpoint], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "fresh")
    hub.faults.error("GET .*resolve.*state-00001", 99, 503)
    done = hasty(hub, HASTY_SYNC, run.path, "--pull", "--repo", REPO)
    assert done.returncode == 6, "the Hub is to blame, not the checkpoint: no older one is taken"
    assert checkpoint.found(run.checkpoints) == []
    hub.faults.clear()
    hub.requests.clear()
    sync(hub, run, "--pull", "--repo", REPO)
    assert here(checkpoint.found(run.checkpoints)[0]) == here(pushed[6])
    fetched = {line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "resolve" in line}
    assert fetched == {"state-00001-of-00002.safetensors"}


def test_a_run_that_is_alive_is_not_pulled_into(hub: HubServer, pushed: dict[int, Checkpoint], run: RunDir) -> None:
    Ledger(run).claim(DistEnv.from_env({}))
    assert "is in use by attempt 1" in sync(hub, run, "--pull", code=9)
    assert hub.requests == []


def test_only_the_same_run_is_gone_on_with(
    hub: HubServer, pushed: dict[int, Checkpoint], run: RunDir, tmp_path: Path
) -> None:
    """Another run in the same repository may be further; to a run that has saved something that means nothing."""
    mine = write_checkpoint(run, 1, started="20260202-120000")
    assert "has no checkpoint that is further than step 1" in sync(hub, run, "--pull")
    shutil.rmtree(mine.path)
    write_checkpoint(run, 3)
    assert "step 6 is here" in sync(hub, run, "--pull")


def test_what_is_pulled_is_gone_on_with_as_the_same_run(hub: HubServer, run: RunDir, tmp_path: Path) -> None:
    """So the disk that it was trained on first may go on from what this one uploads."""
    write_checkpoint(run, 3, identity="the one")
    sync(hub, run)
    fresh = RunDir(tmp_path / "fresh")
    sync(hub, fresh, "--pull", "--repo", REPO)
    assert resume.identity(fresh) == "the one"


# Who may ------------------------------------------------------------------------------------------------------------


SCOPED = ("repo.content.read", "repo.write")


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [
        ("", REPO, "no token here; log in with `hf auth login`"),
        ("hf_wrong", REPO, "the Hub does not know this token (401)"),
        ("hf_read", REPO, "is a read token"),
        ("hf_write", "stranger/open", "this token may not write to it"),
        ("hf_write", "stranger/new", 'You don\'t have the rights to create a model under the namespace "stranger"'),
        ("hf_write", "stranger/secret", "may not be created"),
        ("hf_other", "me/open", "this token may not write to it"),
        ("hf_other", REPO, "may not be created"),
        ("hf_write", "readers/open", "this token may not write to it"),
    ],
)
def test_who_may_not_upload_is_told_so_in_a_line(hub: HubServer, run: RunDir, token: str, repo: str, told: str) -> None:
    write_checkpoint(run, 3)
    people(hub)
    said = sync(hub, run, "--repo", repo, code=8, token=token)
    assert told in said
    assert said.count("\n") == 1
    assert f"checkpoint.repo={repo}: " in said
    unchanged(hub)


def people(hub: HubServer) -> None:
    hub.orgs["readers"] = "read"
    hub.tokens["hf_other"] = {"user": SCOPED, "me/elsewhere": SCOPED}
    hub.tokens["hf_repo"] = {"me/open": SCOPED}
    hub.tokens["hf_me"] = {"me": SCOPED}
    for repo in ("stranger/open", "me/open", "readers/open"):
        hub.add_repo(repo, {}, kind="model")
    hub.add_repo("stranger/secret", {}, kind="model", private=True)


def unchanged(hub: HubServer) -> None:
    for repo in ("stranger/open", "me/open", "readers/open", "stranger/secret"):
        assert len(hub.repo(repo, kind="model").commits) == 1
    assert not [line for line in hub.requests if line.startswith("PUT") or "/commit/" in line]


def doctor(hub: HubServer, repo: str, token: str | None, *words: str, code: int = 0, **env: str) -> str:
    done = gpt2hpc("doctor", "--hub", repo, *words, env={**hub.environment(token), **env})
    assert (done.returncode, done.stderr) == (code, ""), (done.stdout, done.stderr)
    return done.stdout


@pytest.mark.parametrize("has_auth_check", [True, False])
def test_the_doctor_sees_who_may_and_creates_nothing(hub: HubServer, has_auth_check: bool) -> None:
    """With the Hub's own answer, and by what a token says where a Hub has no such route."""
    people(hub)
    hub.has_auth_check = has_auth_check

    def last(token: str | None, repo: str, code: int = 0) -> str:
        return doctor(hub, repo, token, code=code).splitlines()[-1]

    assert re.match("OK +repository: .*may be written to", last("hf_write", "me/open"))
    assert re.match("OK +repository: .*may be written to", last("hf_repo", "me/open"))
    assert re.match("OK +repository: is missing; training creates it, private", last("hf_me", REPO))
    assert re.match("MISSING +token: is a read token", last("hf_read", "me/open", 8))
    for token, repo in (("hf_write", "stranger/open"), ("hf_other", "me/open"), ("hf_write", "readers/open")):
        assert re.match("MISSING repository: this token may not write to it", last(token, repo, 8))
    for token, repo in (("hf_repo", REPO), ("hf_write", "stranger/secret")):
        assert re.match("MISSING repository: is missing, and this token may not create one", last(token, repo, 8))
    unchanged(hub)
    assert not [line for line in hub.requests if "repos/create" in line]


def test_the_doctors_facts_are_json(hub: HubServer) -> None:
    people(hub)
    found = json.loads(doctor(hub, "me/open", "hf_other", "--json", code=8))
    assert [(each["name"], each["state"]) for each in found] == [
        ("login", "OK"),
        ("token", "WARN"),
        ("repository", "MISSING"),
    ]


def test_a_hub_that_is_away_or_busy_is_a_warning(hub: HubServer) -> None:
    people(hub)
    assert doctor(hub, REPO, "hf_write", HF_HUB_OFFLINE="1").startswith("WARN    login: HF_HUB_OFFLINE is set")
    hub.faults.error("GET /api/whoami-v2", 2, 502)
    assert doctor(hub, REPO, "hf_write").startswith("WARN    login: the Hub is not reached: ")
    hub.faults.rate_limit("GET /api/whoami-v2", 2, retry_after_s=300)
    lines = doctor(hub, "me/open", "hf_write").splitlines()
    assert lines[0].startswith("WARN    login: the Hub was asked too often")
    assert lines[-1] == "OK      repository: may be written to"
    hub.faults.error("GET /api/whoami-v2", 1, 503)
    assert doctor(hub, "me/open", "hf_write").startswith("OK      login: user"), "one failure is not the last word"


def test_a_server_that_says_nothing_is_given_up(hub: HubServer) -> None:
    hub.faults.slow("GET /api/whoami-v2", 1, seconds=60)
    program = "a.PATIENCE_S = 1.0; print(a.access('me/model', create=True).text)"
    began = time.monotonic()
    done = hasty(hub, program)
    assert done.stdout == "the Hub is not reached: no answer in 1 s\n", done.stderr
    assert time.monotonic() - began < 20


def test_the_doctor_of_a_run_asks_for_its_repository_too(hub: HubServer, tmp_path: Path) -> None:
    people(hub)
    run = RunDir(tmp_path / "run")
    run.create()
    config = Config(checkpoint=CheckpointConfig(repo="me/open"))
    config_io.store(config, run.config)
    done = gpt2hpc("doctor", "--run-dir", run.path, "--json", env=hub.environment("hf_read"))
    assert (done.returncode, done.stderr) == (8, "")
    found = {each["name"]: each["state"] for each in json.loads(done.stdout)}
    assert (found["login"], found["token"], found["run directory"]) == ("OK", "MISSING", "OK")
    assert "hf_read" not in done.stdout


# Beside the training ------------------------------------------------------------------------------------------------


TRAINING = """
import json, sys, time
from pathlib import Path
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training.uploader import Uploader
from tests.fake_checkpoints import write_checkpoint

run = RunDir(Path(sys.argv[1]))
uploader = Uploader(run, "me/model", lambda text: print(text, flush=True))
longest = 0.0
for step in (3, 6, 9):
    write_checkpoint(run, step)
    began = time.monotonic()
    uploader.published()
    longest = max(longest, time.monotonic() - began)
    time.sleep(float(sys.argv[3]))
print("published in", "no time" if longest < 1 else longest)
uploader.close(float(sys.argv[2]))
"""


def train(hub: HubServer, run: RunDir, *, wait_s: float, step_s: float = 0.0, token: str = "hf_write") -> list[str]:
    """What a training with an uploader says."""
    command = [sys.executable, "-c", TRAINING, str(run.path), str(wait_s), str(step_s)]
    environment = {**os.environ, **hub.environment(token)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines.pop(lines.index("published in no time"))
    return lines


def test_uploads_run_beside_the_training(hub: HubServer, run: RunDir) -> None:
    hub.faults.slow("POST .*/commit/", 1, seconds=2)
    (said,) = train(hub, run, wait_s=60)
    assert said.startswith("uploading to")
    assert {6, 9} <= set(steps(on_hub(hub))), "two are kept, and 3 if it came last"
    assert uploads.waiting(run, REPO) == []
    assert "nothing waits any more" in (run.uploads / uploads.LOG).read_text()


def test_what_earlier_attempts_left_is_uploaded_from_the_start_on(hub: HubServer, run: RunDir) -> None:
    """One that is stopped soon after each save has never the time for it at its end."""
    write_checkpoint(run, 3)
    command = [sys.executable, "-c", START, str(run.path)]
    environment = {**os.environ, **hub.environment("hf_write")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(on_hub(hub)) == [3]


START = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from gpt2hpc import config_io
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import uploads
from gpt2hpc.training.saves import Saves

run = RunDir(Path(sys.argv[1]))
ranks = SimpleNamespace(is_first=True, apart=lambda: None)
saves = Saves(run, config_io.load(run.config), ranks=ranks, ledger=None, attempt=SimpleNamespace(number=1), clock=None, say=print)
saves.resumed(None, started="20260131-120000")
deadline = time.monotonic() + 60
while uploads.waiting(run, "me/model") and time.monotonic() < deadline:
    time.sleep(0.1)
"""


def test_whoever_waits_for_the_last_upload_is_told_and_may_end_it(hub: HubServer, run: RunDir) -> None:
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.slow("POST .*/commit/", 9, seconds=60)
    write_checkpoint(run, 3)
    program = TRAINING.partition("for step in")[0] + END
    command = [sys.executable, "-c", program, str(run.path)]
    environment = {**os.environ, **hub.environment("hf_write")}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 50
    first, last = done.stdout.splitlines()
    assert first == f"uploading to hf://{REPO} what waits, for up to 100 s; Ctrl-C or a signal ends it"
    assert "not on hf://me/model yet: step 3" in last


END = """
ends = time.monotonic() + 4
uploader.close(100.0, lambda: time.monotonic() > ends)
"""


def test_what_is_not_up_in_time_waits_and_is_told(hub: HubServer, run: RunDir) -> None:
    hub.add_repo(REPO, {}, kind="model")
    hub.faults.slow("POST .*/commit/", 9, seconds=60)
    said = train(hub, run, wait_s=3)
    assert said.pop(0).startswith(f"uploading to hf://{REPO} what waits, for up to 3 s")
    told = f"warning: not on hf://{REPO} yet: step 9, 6, 3; `gpt2hpc sync {run.path}` uploads what waits"
    assert said == [told]
    hub.faults.clear()
    sync(hub, run)
    assert uploads.waiting(run, REPO) == []


def test_a_failing_upload_is_a_warning_once(hub: HubServer, run: RunDir) -> None:
    said = train(hub, run, wait_s=30, step_s=2, token="hf_read")
    said = [line for line in said if not line.startswith("uploading to")]
    assert len(said) == 2
    assert said[0].startswith(f"warning: checkpoints are not uploaded: checkpoint.repo={REPO}: is a read token")
    assert "training goes on" in said[0]
    assert said[1].startswith(f"warning: not on hf://{REPO} yet: step 9, 6, 3; ")


def test_uploads_that_work_again_are_told(hub: HubServer, run: RunDir) -> None:
    hub.faults.error("GET /api/whoami-v2", 2, 502)
    said = train(hub, run, wait_s=60, step_s=3)
    said = [line for line in said if not line.startswith("uploading to")]
    assert [line.partition(":")[0] for line in said] == ["warning", "checkpoints are uploaded again"]
    assert uploads.waiting(run, REPO) == []
