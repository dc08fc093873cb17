"""Slurm's reasons and ends, in words and with what to do."""

from __future__ import annotations

import pytest

from gpt2hpc.cluster import reasons


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "Priority: jobs of higher priority come first"),
        ("Resources", "Resources: it is next, once enough nodes are free"),
        (
            "QOSMaxJobsPerUserLimit",
            "QOSMaxJobsPerUserLimit: as many jobs run as are allowed at once by a limit of its QOS, for each user",
        ),
        ("AssocGrpGRES", "AssocGrpGRES: as many GPUs are in use as are allowed by a limit of its account"),
        ("QOSGrpNodeLimit", "QOSGrpNodeLimit: as many nodes are in use as are allowed by a limit of its QOS"),
        (
            "QOSMaxWallDurationPerJobLimit",
            "QOSMaxWallDurationPerJobLimit: it asks for more time than is allowed by a limit of its QOS",
        ),
        (
            "AssocGrpGRESMinutes",
            "AssocGrpGRESMinutes: the compute time that is allowed is used up, or would be by a limit of its account",
        ),
        ("MaxGRESPerAccount", "MaxGRESPerAccount"),
        (
            "ReqNodeNotAvail, UnavailableNodes:n[1-2]",
            "ReqNodeNotAvail: a node that it asks for is down, drained or reserved (UnavailableNodes:n[1-2])",
        ),
        ("SomethingOfTomorrow", "SomethingOfTomorrow"),
        (
            "Nodes required for job are DOWN, DRAINED or reserved",
            "Nodes required for job are DOWN, DRAINED or reserved",
        ),
    ],
)
def test_waits(reason: str, words: str) -> None:
    assert reasons.waits(reason) == words


@pytest.mark.parametrize(
    "reason", ["launch failed requeued held", "launch_failed_requeued_held", "JobHeldUser", "JobHoldMaxRequeue"]
)
def test_what_is_held_is_released(reason: str) -> None:
    assert reasons.is_held(reason)
    assert reasons.waits(reason) != reason
    assert reasons.mend(reason, "12_3") == "scontrol release 12_3"


def test_what_an_administrator_holds_its_owner_cannot_release() -> None:
    assert reasons.is_held("JobHeldAdmin")
    assert reasons.mend("JobHeldAdmin", "12") == ""


@pytest.mark.parametrize("reason", ["Priority", "BeginTime", "Dependency"])
def test_what_only_waits_needs_nothing(reason: str) -> None:
    assert not reasons.is_held(reason)
    assert reasons.mend(reason, "12") == ""


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (("NODE_FAIL",), "NODE_FAIL: a node of it failed"),
        (("TIMEOUT", "TimeLimit"), "TIMEOUT: killed at its time limit"),
        (("CANCELLED", "None", "0:15", "ada"), "CANCELLED: cancelled by ada"),
        (("FAILED", "NonZeroExitCode", "7:0"), "FAILED: its script ended with exit code 7"),
        (("FAILED", "NonZeroExitCode", "0:9"), "FAILED: its script died of signal 9"),
        (("FAILED", "NonZeroExitCode"), "FAILED: its script ended with an error"),
        (
            ("FAILED", "JobLaunchFailure"),
            "FAILED (JobLaunchFailure): its batch script was killed, or could not be started",
        ),
        (("SPECIAL",), "SPECIAL"),
    ],
)
def test_ended(facts: tuple[str, ...], words: str) -> None:
    assert reasons.ended(*facts) == words
