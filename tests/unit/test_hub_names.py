"""Which words name a repository of the Hub: those that its own client takes."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gpt2hpc.data import hub

PARTS = (
    "me",
    "a",
    "x.y",
    "_a",
    "a_",
    "a-b",
    "a--b",
    "a..b",
    "a.git",
    "git",
    ".a",
    "-a",
    "a.",
    "a-",
    "läuft",
    "n" * 96,
    "n" * 97,
)


@pytest.mark.parametrize("user", PARTS)
@pytest.mark.parametrize("name", PARTS)
def test_a_name_is_what_the_client_takes_in_ascii(user: str, name: str) -> None:
    text = f"{user}/{name}"
    try:
        validate_repo_id(text)
        taken = text.isascii()
    except HFValidationError:
        taken = False
    assert hub.is_name(text) is taken


@pytest.mark.parametrize("text", ["", "gpt2", "me/", "/x", "me/x/y", "me/x ", "me/x@main", "me/x\n"])
def test_no_more_and_no_less_than_two_parts(text: str) -> None:
    assert not hub.is_name(text)
