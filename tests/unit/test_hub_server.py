"""The Hub on loopback, as the real clients see it, and what they do by themselves when it fails.

Observed with huggingface_hub 2.4 and datasets 5.2, and most of it asserted below. "5 times" is 5 tries more, after
Retry-After + 1 s (429, also 5xx that say it) or after 1, 2, 4, 8, 8 s; then it ends in HfHubHTTPError, or for a connection in
an exception of httpx2, which is no OSError: RemoteProtocolError (closed), ReadError (reset), ReadTimeout.

- hf_hub_download and snapshot_download, the HEAD. 429, 5xx, time-out: once more at once, whatever Retry-After says, then
  5 times. Closed or reset: no more tries.
- The same, the GET. 429: 5 times. Closed, time-out: 5 times, 1 s apart, and anew after each 10 MiB, in steps of which it
  resumes. Reset: ReadError at once. 5xx: HfHubHTTPError at once. What had come is not kept for the next call.
- HfFileSystem, a range. All: 5 times.
- HfFileSystem, a whole file (block_size=0, or read() from the start). 429, 5xx: 5 times. Closed, reset: once, at once.
- list_repo_tree, list_repo_files, preupload, the LFS batch, the PUT of an LFS object. All: 5 times.
- repo_info, dataset_info, get_paths_info, create_repo, whoami, and the commit itself. All: no more tries.
- load_dataset downloads with hf_hub_download, and streams with HfFileSystem.

- A flipped bit is noticed by none of them, and stays in the cache. HfApi.verify_repo_checksums finds it.
- With the file in the cache, a HEAD that is refused, even for an unknown token, returns the cached file without a word, though
  `main` has moved on. A full commit sha in the cache is not asked for at all. Closed or reset raises even then.
- A commit whose answer was lost has happened. The same upload_folder again finds that nothing is left to do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer, Kind, serving

ROOT = Path(__file__).parents[2]
CALL = """
import json, sys
from tests.unit import test_hub_server
function, arguments = json.loads(sys.argv[1])
print(json.dumps(getattr(test_hub_server, function)(*arguments)))
"""
BIG = bytes(range(256)) * 45_000  # more than the 10 MiB in which hf_hub_download reads
CARD = b"""---
configs:
- config_name: en
  default: true
  data_files:
  - {split: train, path: en/*.parquet}
- config_name: de
  data_files: de.jsonl
---
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as hub:
        yield hub


def client(
    hub: HubServer, function: Callable[..., Any], *args: Any, token: str | None = "hf_write", home: Path | None = None
) -> Any:
    """The answer of one of the functions of this file in a process of its own: HF_ENDPOINT is read at import."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps([function.__name__, args])],
        env={**os.environ, **hub.environment(token, home=home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def outcome(action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What it returned, or the name of the exception."""
    try:
        return action(*args, **kwargs)
    except Exception as error:
        return type(error).__name__


def downloaded(repo_id: str, path: str, revision: str = "main", **kwargs: Any) -> str:
    from huggingface_hub import hf_hub_download

    content = Path(hf_hub_download(repo_id, path, repo_type="dataset", revision=revision, **kwargs)).read_bytes()
    return hashlib.sha256(content).hexdigest()


def outcome_of_download(repo_id: str, path: str) -> Any:
    return outcome(downloaded, repo_id, path)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def publish_and_read_back(kind: Kind, folder: str) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api: Any = HfApi()
    repo: dict[str, Any] = {"repo_id": "user/out", "repo_type": kind}
    api.create_repo(**repo, private=True)
    api.create_repo(**repo, exist_ok=True)
    seen = {"created twice": outcome(api.create_repo, **repo), "who": api.whoami()["name"]}
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", **repo)
    seen["bad card"] = outcome(api.upload_file, path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", **repo)
    first = api.upload_folder(folder_path=folder, path_in_repo="data", **repo).oid
    seen["nothing new"] = api.upload_folder(folder_path=folder, path_in_repo="data", **repo).oid == first
    adds = [CommitOperationAdd("x.bin", b"123"), CommitOperationAdd("q.txt", b"q")]
    changes: list[Any] = [*adds, CommitOperationDelete("data/a.txt")]
    last = api.create_commit(operations=changes, commit_message="changes", parent_commit=first, **repo).oid
    changes = [CommitOperationAdd("late.txt", b"")]
    seen["late"] = outcome(api.create_commit, operations=changes, commit_message="late", parent_commit=first, **repo)
    info = api.repo_info(files_metadata=True, **repo)
    (lfs,) = (file.lfs for file in info.siblings if file.rfilename == "data/sub/b.npy")
    seen["info"] = [info.sha == last, info.private, info.card_data.license, lfs.sha256, lfs.size]
    seen["before"] = sorted(api.list_repo_files(revision=first, **repo))
    seen["tree"] = [item.path for item in api.list_repo_tree(**repo, recursive=True, expand=True)]
    seen["folder"] = [item.path for item in api.list_repo_tree(**repo, path_in_repo="data")]
    seen["paths"] = [item.path for item in api.get_paths_info(paths=["x.bin", "data", "absent"], **repo)]
    seen["refs"] = [[branch.name, branch.target_commit == last] for branch in api.list_repo_refs(**repo).branches]
    seen["exist"] = [api.file_exists(filename=name, **repo) for name in ("q.txt", "absent")]
    snapshot = Path(api.snapshot_download(**repo))
    seen["snapshot"] = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    seen["mismatches"] = list(api.verify_repo_checksums(**repo).mismatches)
    return seen


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_uploads_commits_and_reads(hub: HubServer, tmp_path: Path, kind: Kind) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "b.npy").write_bytes(BIG[:2_000_000])
    (tmp_path / "sub" / "empty.npy").touch()
    seen = client(hub, publish_and_read_back, kind, str(tmp_path))
    left = [".gitattributes", "README.md", "data/sub/b.npy", "data/sub/empty.npy", "q.txt", "x.bin"]
    assert seen == {
        "created twice": "HfHubHTTPError",
        "who": "user",
        "bad card": "ValueError",
        "nothing new": True,
        "late": "HfHubHTTPError",
        "info": [True, True, "mit", sha256(BIG[:2_000_000]), 2_000_000],
        "before": sorted([*left[:4], "data/a.txt"]),
        "tree": sorted([*left, "data", "data/sub"]),
        "folder": ["data/sub"],
        "paths": ["x.bin", "data"],
        "refs": [["main", True]],
        "exist": [True, False],
        "snapshot": left,
        "mismatches": [],
    }
    assert sorted(hub.files("user/out", kind=kind)) == left
    assert hub.files("user/out", kind=kind)["x.bin"] == b"123"
    put = [line for line in hub.requests if line.startswith("PUT")]
    assert len(put) == 2, "b.npy and x.bin, each once"
    assert [commit.title for commit in hub.repo("user/out", kind=kind).commits][-1] == "changes"


def try_doors() -> dict[str, list[Any]]:
    from huggingface_hub import HfApi

    def doors(token: str | bool) -> list[Any]:
        api = HfApi(token=token)
        upload = {"path_or_fileobj": b"x", "path_in_repo": "x", "repo_type": "dataset"}
        return [
            bool(outcome(api.list_repo_files, "user/open", repo_type="dataset") == ["a.txt"]),
            outcome(api.dataset_info, "user/secret").__class__.__name__,
            outcome(downloaded, "user/secret", "a.txt", token=token),
            outcome(api.upload_file, repo_id="user/open", **upload),
            outcome(api.create_repo, "user/new", repo_type="dataset"),
        ]

    return {str(token): doors(token) for token in (False, "hf_unknown", "hf_read")}


def look_for_what_is_absent() -> list[Any]:
    from huggingface_hub import HfApi

    return [
        outcome(downloaded, "user/none", "a.txt"),
        outcome(downloaded, "user/open", "none"),
        outcome(downloaded, "user/open", "a.txt", "none"),
        outcome(HfApi().dataset_info, "user/none"),
        outcome(HfApi().dataset_info, "user/open", revision="0" * 40),
        outcome(lambda: list(HfApi().list_repo_tree("user/open", "none", repo_type="dataset"))),
    ]


def test_refuses_as_the_real_one(hub: HubServer) -> None:
    hub.add_repo("user/open", {"a.txt": b"a"})
    hub.add_repo("user/secret", {"a.txt": b"a"}, private=True)
    assert client(hub, try_doors) == {
        "False": [True, "str", "RepositoryNotFoundError", "HfHubHTTPError", "HfHubHTTPError"],
        "hf_read": [True, "DatasetInfo", sha256(b"a"), "HfHubHTTPError", "HfHubHTTPError"],
        "hf_unknown": [False, "str", "HfHubHTTPError", "HfHubHTTPError", "HfHubHTTPError"],
    }
    missing = ["RepositoryNotFoundError", "RemoteEntryNotFoundError", "RevisionNotFoundError"]
    assert client(hub, look_for_what_is_absent) == [*missing, missing[0], missing[2], missing[1]]


def parquet(rows: int) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    noise = [sha256(str(row).encode()) * 4 for row in range(rows)]
    pq.write_table(pa.table({"text": noise}), file, row_group_size=rows // 4, compression="none")
    return file.getvalue()


def read_through_the_file_system(sha: str) -> dict[str, Any]:
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem

    fs = HfFileSystem()
    with fs.open(f"hf://datasets/user/texts@{sha}/en/0.parquet", block_size=1 << 16) as file:
        rows = pq.read_metadata(file).num_rows
    return {
        "rows": rows,
        "ls": fs.ls("datasets/user/texts@main", detail=False),
        "range": fs.cat_file("datasets/user/texts/de.jsonl", start=2, end=6).decode(),
        "then": fs.read_text(f"datasets/user/texts@{sha}/de.jsonl"),
        "absent": outcome(fs.open, "datasets/user/texts/none"),
    }


def test_file_system_reads_ranges_of_a_commit(hub: HubServer) -> None:
    data = parquet(8000)
    sha = hub.add_repo("user/texts", {"en/0.parquet": data, "de.jsonl": b'{"text": "then"}\n'})
    hub.commit("user/texts", {"en/0.parquet": None, "de.jsonl": b'{"text": "now"}\n'})
    assert client(hub, read_through_the_file_system, sha, token=None) == {
        "rows": 8000,
        "ls": ["datasets/user/texts@main/de.jsonl"],
        "range": "text",
        "then": '{"text": "then"}\n',
        "absent": "FileNotFoundError",
    }
    read = sum(size for line, size in hub.sent if "0.parquet" in line)
    assert 0 < read < len(data) / 4, "the footer, not the file"


def load_datasets(sha: str) -> dict[str, Any]:
    import datasets

    of = {name: datasets.load_dataset_builder("user/texts", name).config.data_files for name in ("en", "de")}
    return {
        "files": {name: {split: list(files) for split, files in by_split.items()} for name, by_split in of.items()},
        "default": datasets.load_dataset_builder("user/texts", revision=sha).config.name,
        "parquet": datasets.load_dataset("user/texts", split="train").num_rows,
        "jsonl": datasets.load_dataset("user/lines", split="train")["text"][:],
        "private": outcome(datasets.load_dataset_builder, "user/secret"),
    }


def test_datasets_resolves_configs_and_loads(hub: HubServer) -> None:
    files = {"README.md": CARD, "en/0.parquet": parquet(8), "en/1.parquet": parquet(4), "de.jsonl": b'{"text": "d"}\n'}
    sha = hub.add_repo("user/texts", files)
    hub.add_repo("user/lines", {"train.jsonl": b'{"text": "a"}\n{"text": "b"}\n'})
    hub.add_repo("user/secret", {"train.jsonl": b'{"text": "a"}\n'}, private=True)
    base = f"hf://datasets/user/texts@{sha}"
    assert client(hub, load_datasets, sha, token=None) == {
        "files": {"en": {"train": [f"{base}/en/{n}.parquet" for n in (0, 1)]}, "de": {"train": [f"{base}/de.jsonl"]}},
        "default": "en",
        "parquet": 12,
        "jsonl": ["a", "b"],
        "private": "DatasetNotFoundError",
    }
    elsewhere = {line for line in hub.requests if not re.match(r"\w+ /", line)}
    assert elsewhere, "datasets no longer asks for its viewer: say so in hub_server.py"
    assert all("datasets-server.127.0.0.1" in line for line in elsewhere), elsewhere


def download_all(names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda name: outcome(downloaded, "user/files", name), names), strict=True))


def test_what_a_download_does_under_faults(hub: HubServer) -> None:
    faults: dict[str, Callable[[str], None]] = {
        "head-429": lambda name: hub.faults.rate_limit(f"HEAD .*/{name}", 2, retry_after_s=0),
        "head-500": lambda name: hub.faults.error(f"HEAD .*/{name}", 1, 503),
        "get-429": lambda name: hub.faults.rate_limit(f"GET .*/{name}", 1, retry_after_s=0),
        "get-500": lambda name: hub.faults.error(f"GET .*/{name}", 1, 500),
        "drop": lambda name: hub.faults.drop(f"GET .*/{name}", 1, after_bytes=100),
        "drops": lambda name: hub.faults.drop(f"GET .*/{name}", 6, after_bytes=100),
        "resume.bin": lambda name: hub.faults.drop(f"GET .*/{name}", 1, after_bytes=11_000_000),
        "reset": lambda name: hub.faults.drop(f"GET .*/{name}", 1, after_bytes=100, reset=True),
        "head-drop": lambda name: hub.faults.drop(f"HEAD .*/{name}", 1, after_bytes=0),
        "head-reset": lambda name: hub.faults.drop(f"HEAD .*/{name}", 1, after_bytes=0, reset=True),
        "corrupt": lambda name: hub.faults.corrupt(f"GET .*/{name}", 1),
    }
    contents = {name: BIG if name == "resume.bin" else name.encode() * 100 for name in faults}
    hub.add_repo("user/files", contents)
    for name, add in faults.items():
        add(f"{name}$")
    seen = client(hub, download_all, list(faults))
    assert hub.faults.unspent() == []
    right = {name for name in faults if seen[name] == sha256(contents[name])}
    assert right == {"head-429", "head-500", "get-429", "drop", "resume.bin"}
    assert {name: seen[name] for name in ("get-500", "drops", "reset", "head-drop", "head-reset")} == {
        "get-500": "HfHubHTTPError",
        "drops": "RemoteProtocolError",
        "reset": "ReadError",
        "head-drop": "RemoteProtocolError",
        "head-reset": "ReadError",
    }
    changed = bytearray(contents["corrupt"])
    changed[len(changed) // 2] ^= 1
    assert seen["corrupt"] == sha256(bytes(changed)), "taken as it came"
    again = [size for line, size in hub.sent if re.match("GET.*resume.bin", line)][1]
    assert again == len(BIG) - 10 * 2**20, "resumed"


def stream_all(names: list[str]) -> dict[str, str]:
    from huggingface_hub import HfFileSystem

    def read(name: str) -> str:
        with HfFileSystem().open(f"datasets/user/files/{name}", block_size=1 << 20) as file:
            if name.startswith("range"):
                file.seek(5)
                return sha256(b"01234" + file.read(len(BIG)))
            return sha256(file.read())

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda name: outcome(read, name), names), strict=True))


def test_what_the_file_system_does_under_faults(hub: HubServer) -> None:
    faults: dict[str, Callable[[str], None]] = {
        "range-429": lambda name: hub.faults.rate_limit(name, 1, retry_after_s=0),
        "range-500": lambda name: hub.faults.error(name, 1, 500),
        "range-drop": lambda name: hub.faults.drop(name, 1, after_bytes=100),
        "range-reset": lambda name: hub.faults.drop(name, 1, after_bytes=100, reset=True),
        "range-corrupt": lambda name: hub.faults.corrupt(name, 1),
        "whole-500": lambda name: hub.faults.error(name, 1, 500),
        "whole-drop": lambda name: hub.faults.drop(name, 1, after_bytes=100),
        "whole-drops": lambda name: hub.faults.drop(name, 2, after_bytes=100),
        "whole-reset": lambda name: hub.faults.drop(name, 1, after_bytes=100, reset=True),
    }
    content = b"0123456789" * 1000
    hub.add_repo("user/files", dict.fromkeys(faults, content))
    for name, add in faults.items():
        add(f"GET .*/{name}$")
    seen = client(hub, stream_all, list(faults), token=None)
    assert hub.faults.unspent() == []
    assert {name for name in faults if seen[name] != sha256(content)} == {"range-corrupt", "whole-drops"}
    assert seen["whole-drops"] == "RemoteProtocolError"
    assert len(seen["range-corrupt"]) == 64, "taken as it came"


def call_all(folder: str) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()

    def upload(repo: str) -> bool:
        change = [CommitOperationAdd("x.bin", repo.encode())]
        return bool(api.create_commit(f"user/{repo}", change, commit_message="x", repo_type="dataset").oid)

    def lost(repo: str) -> list[Any]:
        put: dict[str, Any] = {"repo_id": f"user/{repo}", "folder_path": folder, "repo_type": "dataset"}
        return [outcome(api.upload_folder, **put), api.upload_folder(**put).oid]

    calls: dict[str, Callable[[str], Any]] = {
        "info": lambda repo: bool(api.dataset_info(f"user/{repo}").sha),
        "tree": lambda repo: api.list_repo_files(f"user/{repo}", repo_type="dataset"),
        "paths": lambda repo: bool(api.get_paths_info(f"user/{repo}", ["a"], repo_type="dataset")),
        "create": lambda repo: bool(api.create_repo(f"user/{repo}", repo_type="dataset", exist_ok=True)),
        "preupload": upload,
        "batch": upload,
        "put": upload,
        "commit": upload,
        "lost": lost,
    }
    with ThreadPoolExecutor(len(calls)) as pool:
        return dict(zip(calls, pool.map(lambda call: outcome(calls[call], call), calls), strict=True))


def test_what_calls_and_uploads_do_under_faults(hub: HubServer, tmp_path: Path) -> None:
    for repo in ("info", "tree", "paths", "create", "preupload", "batch", "put", "commit", "lost"):
        hub.add_repo(f"user/{repo}", {"a": b"a"})
    for pattern in ("/user/info", "/tree/tree/", "/paths/paths-info/", "repos/create", "/preupload/preupload/"):
        hub.faults.rate_limit(pattern, 1, retry_after_s=0)
    hub.faults.rate_limit(r"/batch\.git/", 1, retry_after_s=0)
    hub.faults.error(f"PUT .*{sha256(b'put')}", 1, 503)
    hub.faults.rate_limit("/commit/commit/", 1, retry_after_s=0)
    hub.faults.drop("/lost/commit/", 1, after_bytes=0)
    (tmp_path / "b.bin").write_bytes(b"b")
    seen = client(hub, call_all, str(tmp_path))
    assert hub.faults.unspent() == []
    assert seen == {
        "info": "HfHubHTTPError",
        "tree": ["a"],
        "paths": "HfHubHTTPError",
        "create": "HfHubHTTPError",
        "preupload": True,
        "batch": True,
        "put": True,
        "commit": "HfHubHTTPError",
        "lost": ["RemoteProtocolError", hub.repo("user/lost").commits[1].sha],
    }
    assert len(hub.repo("user/lost").commits) == 2


def test_a_cached_file_hides_errors_and_changes(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add_repo("user/texts", {"a.txt": b"old"})
    get = ["user/texts", "a.txt"]
    assert client(hub, downloaded, *get, home=tmp_path) == sha256(b"old")
    hub.commit("user/texts", {"a.txt": b"new"})
    hub.faults.rate_limit("HEAD", 1, retry_after_s=60)
    assert client(hub, downloaded, *get, home=tmp_path) == sha256(b"old"), "at once, and not what main has"
    assert client(hub, downloaded, *get, home=tmp_path, token="hf_unknown") == sha256(b"old")
    hub.faults.drop("HEAD", 1, after_bytes=0)
    assert client(hub, outcome_of_download, *get, home=tmp_path) == "RemoteProtocolError"
    assert client(hub, downloaded, *get, home=tmp_path) == sha256(b"new")
    hub.requests.clear()
    assert client(hub, downloaded, *get, old, home=tmp_path) == sha256(b"old")
    assert hub.requests == []


def test_serves_a_directory_until_interrupted(tmp_path: Path) -> None:
    (tmp_path / "user" / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "user" / "texts" / "sub" / "a.txt").write_text("a")
    command = [sys.executable, "-m", "tests.hub_server", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/datasets/user/texts/resolve/main/sub/a.txt") as answer:
            assert answer.read() == b"a"
        server.send_signal(signal.SIGINT)
        assert server.communicate(timeout=10) == ("", "")
    assert server.returncode == 0


def test_a_client_that_dies_in_the_middle_of_a_commit_leaves_nothing(hub: HubServer) -> None:
    hub.add_repo("user/texts", {"a.txt": b"a"})
    head = "POST /api/datasets/user/texts/commit/main HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b'{"key": "header", "value": {"summary": "cut')
    client(hub, downloaded, "user/texts", "a.txt")
    assert len(hub.repo("user/texts").commits) == 1


def test_ends_with_slow_answers_and_open_connections() -> None:
    before = threading.active_count()
    with serving() as hub:
        hub.faults.slow("GET /slow", 1, seconds=60)
        thread = threading.Thread(target=outcome, args=(urllib.request.urlopen, f"{hub.url}/slow"))
        thread.start()
        while not hub.requests:
            threading.Event().wait(0.01)
    thread.join(5)
    assert not thread.is_alive()
    assert threading.active_count() <= before + 1
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(hub.url)
