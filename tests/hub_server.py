"""A Hugging Face Hub on loopback, for the real huggingface_hub and datasets clients; it fails on request.

    with serving() as hub:
        hub.add_repo("user/texts", {"train.jsonl": b'{"text": "Hello"}\n'})
        hub.faults.drop(r"GET .*/resolve/", times=1, after_bytes=5)
        subprocess.run(program, env={**os.environ, **hub.environment("hf_read")})

    python -m tests.hub_server DIR      # serves DIR/USER/NAME/* as dataset repositories, until interrupted

It has the branch `main` and all commits by full sha; no other branches, tags, pull requests, deletion or Xet.
A client reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, so give them to a new process: see `environment`.
`datasets` also calls two other hosts, and goes on without them: it counts a load at its old bucket (not with
HF_UPDATE_DOWNLOAD_COUNTS=0), and for a load without revision= it asks a dataset viewer at `datasets-server.` + the host of
HF_ENDPOINT, which no variable prevents. The proxy variables of `environment` bring such calls here to be refused at once.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import re
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Kind = Literal["dataset", "model"]
Role = Literal["write", "read"]
Scopes = Mapping[str, tuple[str, ...]]
"""Of a fine-grained token: permissions by the name of a user, an organization or a repository."""
LFS_SUFFIXES = {".bin", ".gz", ".npy", ".parquet", ".pt", ".safetensors", ".zip", ".zst"}
LFS_BYTES = 1_000_000
DATE = "2026-01-01T00:00:00.000Z"


def stored_as_lfs(path: str, size: int) -> bool:
    # The real client sends empty files as regular ones, whatever it is told.
    return size > 0 and (size > LFS_BYTES or PurePosixPath(path).suffix in LFS_SUFFIXES)


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    id: str
    kind: Kind
    private: bool
    commits: list[Commit] = field(default_factory=list)

    @property
    def url_path(self) -> str:
        return f"datasets/{self.id}" if self.kind == "dataset" else self.id

    def at(self, revision: str) -> Commit:
        known = {**{commit.sha: commit for commit in self.commits}, "main": self.commits[-1]}
        if revision not in known:
            raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return known[revision]

    def append(self, changes: Mapping[str, bytes | None], *, title: str) -> Commit:
        """A new commit on main; None deletes a file."""
        files = dict(self.commits[-1].files) if self.commits else {}
        for path, data in changes.items():
            files.pop(path, None)
            if data is not None:
                files[path] = Blob(data, stored_as_lfs(path, len(data)))
        said = [self.kind, self.id, len(self.commits), title, *((path, files[path].oid) for path in sorted(files))]
        self.commits.append(Commit(hashlib.sha1(json.dumps(said).encode()).hexdigest(), title, files))
        return self.commits[-1]


class Refusal(Exception):
    """An answer other than 200, with the headers from which the client makes its exceptions."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        named = {"X-Error-Message": message.partition("\n")[0], **({"X-Error-Code": code} if code else {})}
        self.reply = Reply(status, json.dumps({"error": message}).encode(), {**named, **(headers or {})})


@dataclass
class Reply:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, *, status: int = 200) -> Reply:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def line(self) -> str:
        return f"{self.method} {self.target}"

    def asks(self, name: str) -> bool:
        return parse_qs(urlsplit(self.target).query).get(name, [""])[0].lower() in ("true", "1")


@dataclass
class Fault:
    pattern: re.Pattern[str]
    times: int
    refusal: Refusal | None = None
    cut_after_bytes: int | None = None
    reset: bool = False
    corrupt: bool = False
    wait_s: float = 0


class Faults:
    """What goes wrong, and how often: `pattern` is searched for in "METHOD /path?query" of each request.

    A refused request has no effect; one whose answer is slow, cut short or corrupt has had its effect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[Fault] = []

    def _add(self, pattern: str, times: int, **how: Any) -> None:
        with self._lock:
            self._pending.append(Fault(re.compile(pattern), times, **how))

    def rate_limit(self, pattern: str, times: int, retry_after_s: int) -> None:
        headers = {"Retry-After": str(retry_after_s)}
        self._add(pattern, times, refusal=Refusal(429, "Too many requests", headers=headers))

    def error(self, pattern: str, times: int, status: int) -> None:
        self._add(pattern, times, refusal=Refusal(status, f"Made to fail with {status}"))

    def drop(self, pattern: str, times: int, after_bytes: int, *, reset: bool = False) -> None:
        """The connection ends after so many bytes of the body: closed, or with `reset` as by a peer that crashed.

        A HEAD, whose answer has no body, gets no answer at all.
        """
        self._add(pattern, times, cut_after_bytes=after_bytes, reset=reset)

    def corrupt(self, pattern: str, times: int) -> None:
        """One bit of the middle byte of the body is flipped."""
        self._add(pattern, times, corrupt=True)

    def slow(self, pattern: str, times: int, seconds: float) -> None:
        self._add(pattern, times, wait_s=seconds)

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()

    def unspent(self) -> list[tuple[str, int]]:
        """Patterns that have yet to strike, and how often: empty when everything went wrong as planned."""
        with self._lock:
            return [(fault.pattern.pattern, fault.times) for fault in self._pending if fault.times > 0]

    def strike(self, line: str) -> list[Fault]:
        with self._lock:
            struck = [fault for fault in self._pending if fault.times > 0 and fault.pattern.search(line)]
            for fault in struck:
                fault.times -= 1
            return struck


class HubServer:
    """Repositories, tokens and faults; safe to change while clients talk to it.

    All tokens are of one user, who is a member of `orgs` and writes only there and at home.
    With `has_auth_check` False it is a Hub without the routes of `HfApi.auth_check`.
    `requests` has "METHOD /path?query" of each request, `sent` that and the bytes of its answer, `bugs` this server's own.
    """

    def __init__(self, port: int = 0) -> None:
        self.tokens: dict[str, Role | Scopes] = {"hf_write": "write", "hf_read": "read"}
        self.user = "user"
        self.orgs: dict[str, str] = {"me": "write"}  # with the role in it
        self.has_auth_check = True
        self.faults = Faults()
        self.requests: list[str] = []
        self.sent: list[tuple[str, int]] = []
        self.bugs: list[str] = []
        self.stopped = threading.Event()
        self._lock = threading.RLock()
        self._repos: dict[tuple[Kind, str], Repo] = {}
        self._objects: dict[str, bytes] = {}
        self._homes = tempfile.TemporaryDirectory(prefix="hub-clients-", ignore_cleanup_errors=True)
        self._http = _Http(self, port)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()
        self._http.hang_up()
        self._thread.join()
        self._homes.cleanup()

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes], *, kind: Kind = "dataset", private: bool = False
    ) -> str:
        """The sha of its first commit."""
        with self._lock:
            assert (kind, repo_id) not in self._repos, repo_id
            repo = self._repos[kind, repo_id] = Repo(repo_id, kind, private)
            return self._append(repo, files, title="initial commit").sha

    def commit(self, repo_id: str, files: Mapping[str, bytes | None], *, kind: Kind = "dataset") -> str:
        """The sha of a new commit on main, as made by someone else; None deletes."""
        with self._lock:
            return self._append(self.repo(repo_id, kind=kind), files, title="a change by someone else").sha

    def files(self, repo_id: str, revision: str = "main", kind: Kind = "dataset") -> dict[str, bytes]:
        with self._lock:
            return {path: blob.data for path, blob in self.repo(repo_id, kind=kind).at(revision).files.items()}

    def repo(self, repo_id: str, *, kind: Kind = "dataset") -> Repo:
        return self._repos[kind, repo_id]

    def environment(self, token: str | None = None, *, home: Path | None = None) -> dict[str, str]:
        """What a client process needs, over os.environ. `home` is its HF_HOME: without one, new and empty."""
        home = home or Path(tempfile.mkdtemp(dir=self._homes.name))
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), self.url)
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            # A token of the person who runs the tests is unknown here, and would be refused.
            "HF_TOKEN": token or "",
            "HF_TOKEN_PATH": str(home / "token"),
            **proxies,
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        }

    def reply(self, request: Request) -> Reply:
        try:
            with self._lock:
                return self._page(request)
        except Refusal as refusal:
            return refusal.reply
        except Exception:
            self.bugs.append(f"{request.line}\n{traceback.format_exc()}")
            return Refusal(500, traceback.format_exc()).reply

    def _page(self, request: Request) -> Reply:
        split = urlsplit(request.target)
        if request.method == "CONNECT" or split.netloc:
            raise Refusal(403, "no other host is reached from here")
        for methods, pattern, page in ROUTES:
            if request.method in methods and (match := pattern.fullmatch(split.path)):
                return page(self, request, {name: unquote(part) for name, part in match.groupdict().items() if part})
        raise Refusal(404, f"Sorry, we can't find the page you are looking for: {request.line}")

    def _token(self, request: Request) -> Role | Scopes | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            # These very words keep the client from taking it for a missing repository.
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _is_member(self, repo_id: str, *, writes: bool) -> bool:
        owner = repo_id.split("/")[0]
        return owner == self.user or (owner in self.orgs and (not writes or self.orgs[owner] != "read"))

    def _may_write(self, token: Role | Scopes | None, repo_id: str) -> bool:
        """To the repository, or for a name that ends in / to any of its owner's."""
        if isinstance(token, Mapping):
            named = (repo_id, repo_id.split("/")[0])
            if not any("repo.write" in token.get(name, ()) for name in named):
                return False
        return token not in (None, "read") and self._is_member(repo_id, writes=True)

    def _find(self, request: Request, at: Mapping[str, str], *, writes: bool = False) -> tuple[Repo, Commit]:
        token = self._token(request)
        repo = self._repos.get(("dataset" if at.get("kind") else "model", at["repo_id"]))
        if repo is None or (repo.private and (token is None or not self._is_member(repo.id, writes=False))):
            raise Refusal(401 if repo and token is None else 404, "Repository not found", code="RepoNotFound")
        if writes and not self._may_write(token, repo.id):
            raise Refusal(403 if token else 401, "You don't have the rights to write here")
        return repo, repo.at(at.get("revision", "main"))

    def _append(self, repo: Repo, files: Mapping[str, bytes | None], *, title: str) -> Commit:
        commit = repo.append(files, title=title)
        self._objects.update((blob.sha256, blob.data) for blob in commit.files.values() if blob.lfs)
        return commit

    # Pages: the accounts and repositories

    def _whoami(self, request: Request, at: Mapping[str, str]) -> Reply:
        token = self._token(request)
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        access: dict[str, Any] = {"displayName": "a token", "createdAt": DATE, "role": token}
        if isinstance(token, Mapping):
            scoped = [
                {"entity": {"_id": "0", "type": self._kind_of(name), "name": name}, "permissions": list(permissions)}
                for name, permissions in token.items()
            ]
            access["role"], access["fineGrained"] = "fineGrained", {"global": [], "scoped": scoped}
        orgs = [{"type": "org", "id": "0", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        auth = {"type": "access_token", "accessToken": access}
        return Reply.of({"type": "user", "id": "0", "name": self.user, "fullname": "User", "orgs": orgs, "auth": auth})

    def _kind_of(self, name: str) -> str:
        return "model" if "/" in name else "org" if name in self.orgs else "user"

    def _auth_check(self, request: Request, at: Mapping[str, str]) -> Reply:
        if not self.has_auth_check:
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        self._find(request, at, writes="write" in at)
        return Reply(200, b"OK")

    def _validate_card(self, request: Request, at: Mapping[str, str]) -> Reply:
        try:
            card_data(json.loads(request.body)["content"])
        except yaml.YAMLError as error:
            return Reply.of({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        return Reply.of({"errors": [], "warnings": []})

    def _create(self, request: Request, at: Mapping[str, str]) -> Reply:
        token, asked = self._token(request), json.loads(request.body)
        kind: Kind = "dataset" if asked.get("type") == "dataset" else "model"
        owner = asked.get("organization") or self.user
        if not self._may_write(token, f"{owner}/"):
            why = f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'
            raise Refusal(403 if token else 401, why)
        repo_id = f"{owner}/{asked['name']}"
        exists = (kind, repo_id) in self._repos
        if not exists:
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES))
            private = asked.get("visibility") == "private"
            self.add_repo(repo_id, {".gitattributes": attributes.encode()}, kind=kind, private=private)
        said = {"url": f"{self.url}/{self.repo(repo_id, kind=kind).url_path}", "name": repo_id}
        return Reply.of({**said, "error": "You already created this repo"}, status=409) if exists else Reply.of(said)

    def _info(self, request: Request, at: Mapping[str, str]) -> Reply:
        repo, commit = self._find(request, at)
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if request.asks("blobs"):
                lfs = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134} if blob.lfs else None
                siblings[-1] |= {"size": len(blob.data), "blobId": blob.oid, "lfs": lfs}
        card = commit.files.get("README.md")
        named = {"_id": "0", "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha, "siblings": siblings}
        dated = {"createdAt": DATE, "lastModified": DATE, "downloads": 0, "likes": 0, "tags": []}
        seen = {"private": repo.private, "gated": False, "disabled": False}
        return Reply.of({**named, **dated, **seen, "cardData": card_data(card.data.decode()) if card else {}})

    def _refs(self, request: Request, at: Mapping[str, str]) -> Reply:
        commit = self._find(request, at)[1]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit.sha}
        return Reply.of({"branches": [main], "converts": [], "tags": [], "pullRequests": []})

    # Pages: reading files

    def _tree(self, request: Request, at: Mapping[str, str]) -> Reply:
        commit = self._find(request, at)[1]
        folder = PurePosixPath(at.get("path", "."))
        entries = described(commit)
        inside = [path for path in entries if folder in PurePosixPath(path).parents]
        if not inside and folder.name:
            raise Refusal(404, f"{folder} does not exist on {commit.sha}", code="EntryNotFound")
        shown = inside if request.asks("recursive") else [one for one in inside if PurePosixPath(one).parent == folder]
        return Reply.of([entries[path] for path in shown])

    def _paths_info(self, request: Request, at: Mapping[str, str]) -> Reply:
        entries = described(self._find(request, at)[1])
        return Reply.of([entries[path] for path in parse_qs(request.body.decode())["paths"] if path in entries])

    def _resolve(self, request: Request, at: Mapping[str, str]) -> Reply:
        commit = self._find(request, at)[1]
        known = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        blob = commit.files.get(at["path"])
        if blob is None:
            raise Refusal(404, "Entry not found", code="EntryNotFound", headers=known)
        known |= {"ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream"}
        if blob.lfs:
            known |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.etag}"'}
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if part is None or not any(part.groups()):
            return Reply(200, blob.data, known)
        size = len(blob.data)
        first, last = (int(end) if end else None for end in part.groups())
        start, end = (size - (last or 0), size) if first is None else (first, size if last is None else last + 1)
        start, end = max(start, 0), min(end, size)
        if start >= end:
            raise Refusal(416, "Range not satisfiable", headers={**known, "Content-Range": f"bytes */{size}"})
        return Reply(206, blob.data[start:end], {**known, "Content-Range": f"bytes {start}-{end - 1}/{size}"})

    # Pages: writing files

    def _preupload(self, request: Request, at: Mapping[str, str]) -> Reply:
        commit = self._find(request, at, writes=True)[1]
        answers = []
        for file in json.loads(request.body)["files"]:
            mode = "lfs" if stored_as_lfs(file["path"], file["size"]) else "regular"
            blob = commit.files.get(file["path"])
            # With the oid of what is there the client leaves out unchanged files.
            oid = {"oid": blob.etag} if blob else {}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return Reply.of({"files": answers, "commitOid": commit.sha})

    def _lfs_batch(self, request: Request, at: Mapping[str, str]) -> Reply:
        self._find(request, at, writes=True)
        objects = json.loads(request.body)["objects"]
        for each in objects:
            if each["oid"] not in self._objects:
                each["actions"] = {"upload": {"href": f"{self.url}/lfs/{each['oid']}", "header": {}}}
        return Reply.of({"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request, at: Mapping[str, str]) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != at["oid"]:
            raise Refusal(400, "The content does not match its sha256")
        self._objects[at["oid"]] = request.body
        return Reply(200, b"")

    def _commit(self, request: Request, at: Mapping[str, str]) -> Reply:
        repo, head = self._find(request, at, writes=True)
        title, changes = "", dict[str, bytes | None]()
        for line in request.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            path = value.get("path", "")
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head.sha) != head.sha:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                changes[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self._objects:
                    raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
                changes[path] = self._objects[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                gone = PurePosixPath(path)
                changes |= dict.fromkeys(
                    one for one in head.files if gone in (PurePosixPath(one), *PurePosixPath(one).parents)
                )
        commit = self._append(repo, changes, title=title)
        url = f"{self.url}/{repo.url_path}/commit/{commit.sha}"
        return Reply.of({"success": True, "commitUrl": url, "commitOid": commit.sha})


def described(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files and folders by path, as the Hub shows them in trees."""
    folders = {str(folder) for path in commit.files for folder in PurePosixPath(path).parents if folder.name}
    entries: dict[str, dict[str, Any]] = {
        path: {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
        for path in folders
    }
    for path, blob in commit.files.items():
        entries[path] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
        if blob.lfs:
            entries[path]["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return dict(sorted(entries.items()))


def card_data(card: str) -> dict[str, Any]:
    """The YAML between the two --- of a README.md."""
    match = re.match(r"---\s*\n(.*?\n)?---\s*(\n|$)", card, re.DOTALL)
    data = yaml.safe_load(match[1] or "") if match else None
    return data if isinstance(data, dict) else {}


API = r"/api/((?P<kind>datasets)|models)/(?P<repo_id>[^/]+/[^/]+)"
SITE = r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
PAGES: list[tuple[str, str, Callable[[HubServer, Request, Mapping[str, str]], Reply]]] = [
    ("GET", "/api/whoami-v2", HubServer._whoami),
    ("POST", "/api/validate-yaml", HubServer._validate_card),
    ("POST", "/api/repos/create", HubServer._create),
    ("GET", f"{API}(/revision{REVISION})?", HubServer._info),
    ("GET", f"{API}/auth-check(?P<write>/write)?", HubServer._auth_check),
    ("GET", f"{API}/refs", HubServer._refs),
    ("GET", f"{API}/tree{REVISION}(/(?P<path>.+))?", HubServer._tree),
    ("POST", f"{API}/paths-info{REVISION}", HubServer._paths_info),
    ("GET HEAD", f"{SITE}/resolve{REVISION}/(?P<path>.+)", HubServer._resolve),
    ("POST", f"{API}/preupload{REVISION}", HubServer._preupload),
    ("POST", f"{API}/commit{REVISION}", HubServer._commit),
    ("POST", rf"{SITE}\.git/info/lfs/objects/batch", HubServer._lfs_batch),
    # As at the real Hub, whoever was given this address may write there without a token.
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer._lfs_put),
]
ROUTES = [(methods.split(), re.compile(pattern), page) for methods, pattern, page in PAGES]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, port: int) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        # Else clients that keep their connections would be served on after the end.
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.bugs.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave together: else Nagle's algorithm costs 40 ms per answer.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Http

    def serve(self) -> None:
        hub = self.server.hub
        request = Request(
            self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, self._body()
        )
        hub.requests.append(request.line)
        faults = hub.faults.strike(request.line)
        hub.stopped.wait(sum(fault.wait_s for fault in faults))
        refusals = [fault.refusal for fault in faults if fault.refusal]
        reply = refusals[0].reply if refusals else hub.reply(request)
        self._send(reply, faults)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = serve  # noqa: N815

    def _body(self) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionResetError("the client ended in the middle of its request")
        return body

    def _send(self, reply: Reply, faults: list[Fault]) -> None:
        body = bytearray(reply.body)
        if body and any(fault.corrupt for fault in faults):
            body[len(body) // 2] ^= 1
        cut = next((fault for fault in faults if fault.cut_after_bytes is not None), None)
        sent = b"" if self.command == "HEAD" else body[: cut.cut_after_bytes] if cut else body
        if cut is None or self.command != "HEAD":
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)
            self.server.hub.sent.append((f"{self.command} {self.path}", len(sent)))
        if cut:
            self._cut(reset=cut.reset)

    def _cut(self, *, reset: bool) -> None:
        self.wfile.flush()
        self.close_connection = True
        if reset:
            # Time for the client to read what was sent: a reset discards the rest.
            time.sleep(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[HubServer]:
    """A running Hub. A bug of its own fails the test at the end: the client would only have seen a status 500."""
    hub = HubServer(port)
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
    assert not hub.bugs, "\n".join(hub.bugs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves DIR/USER/NAME/* as dataset repositories.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with serving(arguments.port) as hub:
        for repo in sorted(path for path in arguments.directory.glob("*/*") if path.is_dir()):
            files = {str(path.relative_to(repo)): path.read_bytes() for path in repo.rglob("*") if path.is_file()}
            hub.add_repo(f"{repo.parent.name}/{repo.name}", files)
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
            print(hub.url, flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
