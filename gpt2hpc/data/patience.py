"""Questions to the Hugging Face Hub: asked again where that may help, and a line that says what to do where it will not.

The client has tries of its own, which differ from call to call: a commit has none, a download gives up at a reset.
"""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gpt2hpc import cli
from gpt2hpc.errors import DataError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRIES = 8
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 120.0
STALL_S = 300.0
"""Without a byte, after which a request is given up."""
T = TypeVar("T")
_random = random.Random()
"""Of its own: a training's generator must not know of a Hub that was asked twice."""


STAGE = "fetch it with `gpt2hpc stage`"


class WrongBytesError(Exception):
    """A download that is not what the repository says it is."""


class LateError(DataError):
    """What was waited for has not come; later it may."""


class HubDownError(LateError):
    """The Hub was not reached, or failed for as long as it was asked; later it may answer. `what` is that alone, without a mend."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(f"{what}{mend}")
        self.what = what


@functools.cache
def _give_up_stalled_requests() -> None:
    """For every request from now on: the client itself waits for ever for a server that says nothing."""
    from huggingface_hub import get_session, set_client_factory

    known = get_session()

    def client() -> Any:
        return type(known)(event_hooks=known.event_hooks, follow_redirects=True, timeout=STALL_S)

    set_client_factory(client)


def asked(about: object, question: Callable[[HfApi], T], *, what: str = "", elsewhere: str = STAGE) -> T:
    """The Hub's answer; a failure that may pass is followed by another try, at most TRIES in all.

    Args:
        about: What the question is about, for messages.
        question: Asked with a client, as often as it takes.
        what: A file of it.
        elsewhere: What to do instead where there is a network, for messages.

    Raises DataError for a failure that will not pass, HubDownError for one that did not.
    """
    from huggingface_hub import HfApi, errors, is_offline_mode

    # The second is the HTTP library's own base class, whichever library the client uses.
    passing = (
        errors.HfHubHTTPError,
        cast("type[Exception]", errors.HfHubHTTPError.__mro__[1]),
        errors.FileMetadataError,
    )
    name = f"{about}/{what}" if what else str(about)
    _give_up_stalled_requests()
    for left in reversed(range(TRIES)):
        try:
            return question(HfApi())
        except errors.GatedRepoError:
            mend = "is gated: accept its terms on the Hub, and log in with `hf auth login`"
        except errors.RepositoryNotFoundError:
            mend = "is not on the Hub, or is private: check the name, or log in with `hf auth login`"
        except errors.RevisionNotFoundError:
            mend = "has no such revision (any more): name a commit, branch or tag"
        except errors.LocalEntryNotFoundError as error:  # what a download makes of any failure of its first request
            if is_offline_mode():
                raise HubDownError(f"{name} {OFFLINE}", f": {elsewhere} where there is a network") from None
            mend = _wait(error.__cause__ or error, left, name, elsewhere)
        except errors.EntryNotFoundError:
            mend = "is not in the repository: check the path"
        except errors.OfflineModeIsEnabled:
            raise HubDownError(f"{name} {OFFLINE}", f": {elsewhere} where there is a network") from None
        except (*passing, ConnectionError, TimeoutError, WrongBytesError) as error:
            mend = _wait(error, left, name, elsewhere)
        except RuntimeError as error:  # of Xet storage, or of an upload, with what was the matter as its cause
            mend = _wait(error.__cause__ or error, left, name, elsewhere)
        except OSError as error:
            # Xet's errors pose as missing files and permissions.
            if type(error).__module__.partition(".")[0] != "hf_xet":
                raise
            mend = _wait(error, left, name, elsewhere)
        if mend:
            raise DataError(f"{name} {mend}")
    raise AssertionError("unreachable: without a try left there is a mend")


OFFLINE = "is out of reach, for HF_HUB_OFFLINE is set"


def _wait(error: BaseException, left: int, name: str, elsewhere: str) -> str:
    """Wait as long as the Hub asks for, or longer each time and at random, so that many tasks do not come back at once.

    Returns, at once, what to tell the user if there shall be no further try; HubDownError if that is for lack of tries.
    """
    response = getattr(error, "response", None)
    status: int | None = getattr(response, "status_code", None)
    if status in (401, 403):
        why = f": {told}" if (told := getattr(error, "server_message", None)) else ""
        return f"is refused by the Hub ({status}){why}; log in with `hf auth login`, with a token that may do this"
    said = re.sub(r"\?\S+", "", " ".join(str(error).split()))[:300]  # an upload's address is signed in its query
    if status is not None and status < 500 and status not in (408, 409, 412, 429):
        return f"cannot be had: {said}"
    if left == TRIES - 1:
        cli.warn(
            f"{name}: {said}; trying again for some minutes (where there is no network, {elsewhere} where there is one)"
        )
    if not left:
        failed, later = f"cannot be had: {said} ({TRIES} tries)", "; try again later: what is complete is kept"
        if isinstance(error, WrongBytesError):
            return failed + later
        raise HubDownError(f"{name} {failed}", later)
    longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (TRIES - left))
    try:
        time.sleep(min(LONGEST_WAIT_S, float(response.headers["Retry-After"])) + _random.uniform(0, 1))  # type: ignore[union-attr]
    except (AttributeError, KeyError, ValueError):
        time.sleep(_random.uniform(0, longest_s))
    return ""
