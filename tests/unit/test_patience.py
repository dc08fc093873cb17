from __future__ import annotations

import pytest

from gpt2hpc.data import patience
from gpt2hpc.data.patience import HubDownError
from gpt2hpc.errors import DataError


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)


class Moody:
    """Raises what it was given, one a call, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self, api: object) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


XET = type("XetObjectNotFoundError", (FileNotFoundError,), {"__module__": "hf_xet"})


@pytest.mark.parametrize(
    "error", [RuntimeError("CAS service error"), XET("gone"), ConnectionResetError(), TimeoutError()]
)
def test_what_may_pass_is_asked_again(error: Exception) -> None:
    assert patience.asked("it", Moody(error, error)) == "answer"


def test_what_stays_is_a_line() -> None:
    with pytest.raises(DataError, match=r"it/a.npy cannot be had: CAS service error \(8 tries\)"):
        patience.asked("it", Moody(*[RuntimeError("CAS service error")] * 8), what="a.npy")


def test_a_hub_that_is_down_is_told_with_a_mend_and_without() -> None:
    with pytest.raises(HubDownError) as down:
        patience.asked("it", Moody(*[TimeoutError("no answer")] * 8))
    assert down.value.what == "it cannot be had: no answer (8 tries)"
    assert down.value.line == f"{down.value.what}; try again later: what is complete is kept"


@pytest.mark.parametrize("error", [FileNotFoundError("mine"), OSError(28, "No space left on device")])
def test_errors_of_this_machine_are_not_the_hubs(error: Exception) -> None:
    with pytest.raises(type(error)):
        patience.asked("it", Moody(error))
