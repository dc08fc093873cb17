"""slurm/evaluate.sbatch on the real Slurm: two nodes with two ranks each, preempted once, count what one process counts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from gpt2hpc.config import ModelConfig
from gpt2hpc.run_dir import RunDir
from tests import questions
from tests.cluster.kit import ROOT, Ended, Job, Kit, drives
from tests.published import directory_of
from tests.tiny import gpt2hpc

pytestmark = pytest.mark.timeout(1200)  # with its turn among the others

COUNT = 901


def drive_evaluation(kit: Kit) -> Ended:
    folder = kit.folder / "evaluation"
    model = directory_of(folder / "model", ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=128))
    source, out, log = questions.write(folder / "val.jsonl", COUNT), folder / "result.json", folder / "log.txt"
    variables = {**kit.variables, "MODEL": str(model), "HELLASWAG": str(source), "OUT": str(out)}
    with kit.nodes() as nodes:
        flags = ["--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", "-p", "low", "-w", nodes]
        template = ROOT / "slurm" / "evaluate.sbatch"
        command = ["sbatch", "--parsable", *flags, f"--output={log}", str(template), "--device", "cpu"]
        job = Job(kit._run(command, variables).strip(), RunDir(folder), log)
        kit.until(job, lambda: kit.shown(job)["JobState"] == "RUNNING", "the start")
        time.sleep(5)
        kit.preempt(nodes.split(",")[1])
        return Ended(job, kit.until_ended(job))


@drives(drive_evaluation)
def test_an_evaluation_that_is_preempted_begins_anew(driven: Ended) -> None:
    folder = driven.job.run.path
    assert (driven.slurm["JobState"], driven.slurm["Restarts"]) == ("COMPLETED", "1"), driven.job.told()
    (found,) = json.loads((folder / "result.json").read_text())
    alone = gpt2hpc("evaluate", folder / "model", "--hellaswag", folder / "val.jsonl", "--device", "cpu", "--json")
    assert alone.returncode == 0, alone.stderr
    assert {**found, "seconds": 0} == {**json.loads(alone.stdout), "seconds": 0}
    assert found["hellaswag_examples"] == COUNT
    assert "GPT-2 124M" in Path(driven.job.log).read_text()
