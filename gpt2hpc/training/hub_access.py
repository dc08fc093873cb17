"""Whether checkpoints may go to a repository of the Hub: asked before training, in seconds, and without leaving a trace in it.

What the server says decides: its `auth-check/write` route, which answers for roles, scopes, organizations and resource groups
alike. What the token says of itself explains a refusal, and stands in for that route where a Hub does not have it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from gpt2hpc import finding as findings
from gpt2hpc.data import hub
from gpt2hpc.errors import MissingError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PATIENCE_S = 10.0
"""Of a question, with all its tries: a compute node without internet may drop packets, and look up names for minutes."""
TOKENS = "https://huggingface.co/settings/tokens"

T = TypeVar("T")


@dataclass(frozen=True)
class Finding(findings.Finding):
    """What was found of the Hub."""

    hub: Literal["there", "busy", "away"] = "there"
    """Busy: it answered, with a failure that may pass. Away: there was no answer, or it was not asked."""


class _UnreachableError(Exception):
    """No answer, or none that says anything about us; with the HTTP status, if there is one."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status

    @property
    def hub(self) -> Literal["busy", "away"]:
        return "away" if self.status is None else "busy"


def access(repo: str, *, create: bool) -> Finding | None:
    """Make sure that checkpoints may be uploaded to the model repository `repo`; with `create` make a private one if it is missing.

    Returns None if they may, as far as the Hub tells, or why it does not answer now: they will wait, which is no reason not to train.
    Raises MissingError with what to do about it if they may not.
    """
    found = examine(repo, create=create)
    for finding in found:
        if finding.state == "MISSING":
            raise MissingError(f"checkpoint.repo={repo}: {finding.text}")
    last = found[-1]
    return last if last.hub != "there" else None


def examine(repo: str, *, create: bool) -> list[Finding]:
    """What was found of login, token and repository, up to the first that is missing or cannot be asked."""
    from huggingface_hub import get_token, is_offline_mode

    if not hub.is_name(repo):
        return [Finding("repository", "MISSING", "is no name of a model repository; write USER/NAME")]
    if is_offline_mode():
        return [Finding("login", "WARN", "HF_HUB_OFFLINE is set, so the Hub is not asked", hub="away")]
    if not get_token():
        return [Finding("login", "MISSING", f"no token here; log in with `hf auth login`, or set HF_TOKEN ({TOKENS})")]
    try:
        who, login = _login()
    except _UnreachableError as error:
        return [Finding("login", "WARN", f"the Hub is not reached: {error}", hub=error.hub)]
    found = [login]
    if login.state != "MISSING":
        found.append(_token(who, repo))
        if found[-1].state != "MISSING":
            try:
                found.append(_repository(who, repo, create=create))
            except _UnreachableError as error:
                found.append(Finding("repository", "WARN", f"the Hub does not answer: {error}", hub=error.hub))
    return found


def _login() -> tuple[Mapping[str, Any], Finding]:
    """Who the token's owner is."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        who = _within(lambda api: api.whoami())
    except _UnreachableError as error:
        if error.status != 429:  # strict on this route alone, and a hundred jobs may start at once
            raise
        return {}, Finding("login", "WARN", "the Hub was asked too often whose the token is (429)")
    except HfHubHTTPError as error:
        text = f"the Hub does not know this token ({error.response.status_code}); "
        return {}, Finding("login", "MISSING", f"{text}make a new one ({TOKENS}), and set HF_TOKEN or `hf auth login`")
    return who, Finding("login", "OK", f"{who.get('name')}")


def _token(who: Mapping[str, Any], repo: str) -> Finding:
    """What the token says of itself; only a role that never writes is enough to refuse it."""
    role = _facts(who).get("role")
    if role == "read":
        text = f"is a read token, which uploads nothing; make one with the role write ({TOKENS})"
        return Finding("token", "MISSING", text)
    if role == "write":
        return Finding("token", "OK", "may write")
    if role == "fineGrained":
        if _is_scoped(who, repo) or _is_scoped(who, _owner(repo)):
            return Finding("token", "OK", f"fine-grained, may write to {repo}")
        return Finding(
            "token", "WARN", f"fine-grained, and lists no permission repo.write for {repo} or {_owner(repo)}"
        )
    return Finding("token", "WARN", "does not say what it may do")


def _repository(who: Mapping[str, Any], repo: str, *, create: bool) -> Finding:
    """Whether it is there and may be written to; created where it is not."""
    from huggingface_hub.errors import HfHubHTTPError

    if (found := _written(who, repo)) is not None:
        return found
    if not create:
        return _creatable(who, repo)
    try:
        _within(lambda api: api.create_repo(repo, private=True, exist_ok=True))
    except HfHubHTTPError as error:
        text = f"does not exist (or is hidden from this token), and may not be created: {_said(error)}; {_mend(repo)}"
        return Finding("repository", "MISSING", text)
    hidden = f"exists, but this token may not see it; {_mend(repo)}"
    found = _written(who, repo) or Finding("repository", "MISSING", hidden)
    return Finding("repository", "OK", "created, private") if found.state == "OK" else found


def _written(who: Mapping[str, Any], repo: str) -> Finding | None:
    """Whether this token may write to the repository; None where that is missing."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        _within(lambda api: api.auth_check(repo, write=True))
    except GatedRepoError:
        return Finding("repository", "MISSING", f"is gated, and this token was not let in; {_mend(repo)}")
    except RepositoryNotFoundError:
        return None
    except HfHubHTTPError as error:
        if error.response.status_code in (404, 405):
            return _written_by_its_word(who, repo)
        text = f"this token may not write to it ({_said(error)}); {_mend(repo)}"
        return Finding("repository", "MISSING", text)
    except TypeError:  # a client older than that parameter
        return _written_by_its_word(who, repo)
    return Finding("repository", "OK", "may be written to")


def _written_by_its_word(who: Mapping[str, Any], repo: str) -> Finding | None:
    """The same of a Hub without that route: the repository is there, and the token or its owner's places say the rest."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        _within(lambda api: api.repo_info(repo))
    except RepositoryNotFoundError:
        return None
    except HfHubHTTPError as error:
        return Finding("repository", "MISSING", f"this token may not read it ({_said(error)}); {_mend(repo)}")
    if _is_scoped(who, repo) or _may_own(who, _owner(repo)):
        return Finding("repository", "OK", "is there, and by what the token says may be written to")
    if not _facts(who):
        return Finding("repository", "WARN", "is there; whether it may be written to, the first upload will tell")
    return Finding("repository", "MISSING", f"this token may not write to it; {_mend(repo)}")


def _creatable(who: Mapping[str, Any], repo: str) -> Finding:
    """Of a missing one: whether training would create it."""
    owner = _owner(repo)
    if not who:
        return Finding("repository", "WARN", "is missing; whether it may be created, the start of training will tell")
    if _may_own(who, owner):
        return Finding("repository", "OK", "is missing; training creates it, private")
    own = ", ".join([str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs", ()))])
    text = f"is missing, and this token may not create one under {owner} (its owner is {own}); {_mend(repo)}"
    return Finding("repository", "MISSING", text)


def _mend(repo: str) -> str:
    return f"name one that you may write to, or give the token the permission to write to {repo} ({TOKENS})"


def _owner(repo: str) -> str:
    return repo.partition("/")[0]


def _facts(who: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the token; empty of an OAuth token, which says nothing."""
    return cast("Mapping[str, Any]", (who.get("auth") or {}).get("accessToken") or {})


def _is_scoped(who: Mapping[str, Any], entity: str) -> bool:
    """Whether a fine-grained token lists the permission to write for a user, an organization or a repository by that name."""
    scoped = (_facts(who).get("fineGrained") or {}).get("scoped") or ()
    return any(each["entity"].get("name") == entity and "repo.write" in each["permissions"] for each in scoped)


def _may_own(who: Mapping[str, Any], owner: str) -> bool:
    """Whether this token may create a repository there, as far as it says."""
    orgs = [org for org in who.get("orgs", ()) if org.get("roleInOrg") != "read"]
    if owner not in (who.get("name"), *(org.get("name") for org in orgs)):
        return False
    return _facts(who).get("role") != "fineGrained" or _is_scoped(who, owner)


def _said(error: Exception) -> str:
    """What the server says, without the client's advice."""
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(str(said).split())[:200]


def _within(question: Callable[[HfApi], T]) -> T:
    """The answer, or the server's refusal as the client raises it; _UnreachableError for any other failure, or none in PATIENCE_S.

    In a thread that is left behind: the client waits for ever for a server that says nothing, as the resolver does for a name.
    """
    answers: list[T] = []
    failures: list[Exception] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answers.append(question(HfApi()))
            except Exception as error:
                if _may_pass(error) and time.monotonic() + 1 < deadline and not failures:
                    failures.append(error)  # once more: one 503 is no reason to train without an answer
                    time.sleep(1)
                    continue
                failures.append(error)
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if answers:
        return answers[0]
    if thread.is_alive() and not failures:
        raise _UnreachableError(f"no answer in {PATIENCE_S:g} s")
    if _may_pass(failures[-1]):
        raise _UnreachableError(_said(failures[-1]), _status(failures[-1])) from failures[-1]
    raise failures[-1]


def _may_pass(error: Exception) -> bool:
    """Whether it says something of the network or the server, and nothing of us."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, TypeError):
        return False
    status = _status(error)
    return not isinstance(error, HfHubHTTPError) or status is None or status >= 500 or status in (408, 429)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
