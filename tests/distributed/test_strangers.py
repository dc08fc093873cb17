"""Ranks of two jobs that meet at one port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

PROGRAM = """
import os, torch
from gpt2hpc import cli
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.training.process_group import joined

def main(words):
    with joined(DistEnv.from_env(os.environ), torch.device("cpu")) as ranks:
        print("together as", ranks.rank)
    return 0

raise SystemExit(cli.run(main))
"""


def met(*jobs: str) -> list[tuple[int, str]]:
    """Exit code and what was said, of one rank a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(len(jobs)),
                "GPT2HPC_JOB": job,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, job in enumerate(jobs)
    ]
    told = [rank.communicate(timeout=300)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, told, strict=True)]


def test_ranks_of_one_job_go_on_together() -> None:
    for rank, (code, told) in enumerate(met("7", "7")):
        assert code == 0, told
        assert f"together as {rank}" in told


def test_ranks_of_two_jobs_part_at_once() -> None:
    for rank, (code, told) in enumerate(met("7", "20007")):
        assert code == 1, told  # a crash, which is restarted; it leaves by itself, and not by a signal
        assert f"rank {rank} met ranks of other jobs at port" in told
        assert "7 (restart 0), 20007 (restart 0)" in told or "20007 (restart 0), 7 (restart 0)" in told
        assert "Traceback" not in told
        assert "together" not in told


def test_ranks_of_torchrun_of_which_some_know_of_the_batch_job() -> None:
    """As where a person has an allocation's shell on one node, and started torchrun over ssh on the others."""
    for rank, (code, told) in enumerate(met("7", "local-n2-20260101000000-1")):
        assert code == 0, told
        assert f"together as {rank}" in told
