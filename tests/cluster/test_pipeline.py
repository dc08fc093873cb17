"""From raw text to an exported model, as jobs that wait for each other, while a node is lost."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gpt2hpc import cancel, pipeline
from gpt2hpc.data import demo
from gpt2hpc.errors import RunDirError, UsageError
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.cluster.kit import Ended, Job, Kit, drives, long

pytestmark = pytest.mark.timeout(1200)
STEPS = 60
SETTINGS = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=16"),
    *(
        "--train.tokens_per_step=256",
        "--train.micro_batch_size=2",
        f"--steps={STEPS}",
        "--device=cpu",
        "--train.eval_every=1000",
    ),
    *(
        "--train.eval_tokens=512",
        "--checkpoint.every_steps=10",
        "--checkpoint.stop_margin_s=5",
        "--optimizer.warmup_tokens=512",
    ),
)


@dataclass
class Pipeline:
    run: RunDir
    data: Path
    told: str
    jobs: dict[str, Ended]
    again: subprocess.CompletedProcess[str]


def write_texts(folder: Path) -> None:
    (folder / "texts").mkdir(parents=True)
    for number, text in zip(range(12), demo.demo_documents(), strict=False):
        (folder / "texts" / f"{number}.txt").write_text(text[:20_000])


def command(kit: Kit, folder: Path, nodes: str, *more: str) -> subprocess.CompletedProcess[str]:
    away = ",".join(sorted({f"n{number}" for number in range(1, 9)} - set(nodes.split(","))))
    site = folder / "site.yaml"
    site.write_text(f"{kit.site}\ncpus_per_task: 1\n")
    words = [kit.python, "-m", "gpt2hpc.submit", "pipeline", "--nodes=2", "--nproc=2", "--time=10", f"--exclude={away}"]
    words += [
        f"--site={site}",
        f"--run-dir={folder / 'run'}",
        f"--data.dir={folder / 'data'}",
        f"--source={folder / 'texts'}",
    ]
    words += [
        "--prepare",
        "--array 2 --unit-tokens 20000 --cpus-per-task 1 --time 10",
        "--evaluate",
        "--val-tokens 4096",
    ]
    environment = {**kit.cluster.environment, **kit.variables}
    return subprocess.run(
        [*words, *SETTINGS, *more],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@long
def drive_pipeline(kit: Kit) -> Pipeline:
    folder = kit.folder / "pipeline"
    write_texts(folder)
    with kit.nodes() as nodes:
        done = command(kit, folder, nodes)
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = dict(zip(("train", "evaluate", "export"), re.findall(r"(?m)^job (\d+):", done.stdout), strict=True))
        numbers["finalize"] = re.findall(r"then job (\d+) finalizes", done.stdout)[0]
        run = RunDir(folder / "run")
        folders = {"train": run.slurm, "finalize": folder / "data" / "slurm"}
        jobs = {
            name: Job(number, run, folders.get(name, run.after / name) / f"{number}_0_log.out")
            for name, number in numbers.items()
        }
        kit.until_step(jobs["train"], 15)
        kit.until_saved(jobs["train"], 10)
        node = nodes.split(",")[1]
        kit.cluster.lose(node)
        kit.until(jobs["train"], lambda: kit.shown(jobs["train"])["Restarts"] != "0", "the restart", seconds=180)
        kit.cluster.bring_back(node)
        ended = {name: Ended(job, kit.until_ended(job, seconds=400)) for name, job in jobs.items()}
        return Pipeline(run, folder / "data", done.stdout, ended, command(kit, folder, nodes))


@drives(drive_pipeline)
def test_from_text_to_an_exported_model_while_a_node_is_lost(driven: Pipeline) -> None:
    for name, job in driven.jobs.items():
        assert (job.slurm["JobState"], job.slurm["ExitCode"]) == ("COMPLETED", "0:0"), f"{name}: {job.job.told()}"
    assert int(driven.jobs["train"].slurm["Restarts"]) >= 1
    for name in ("evaluate", "export"):
        assert driven.jobs[name].slurm["StartTime"] >= driven.jobs["train"].slurm["EndTime"]
    assert tiny.newest(driven.run).step == STEPS
    assert sorted(tiny.losses(driven.run)) == list(range(1, STEPS + 1))

    (result,) = json.loads((driven.run.path / "evaluation.json").read_text())
    assert result["val_tokens"] > 0
    last = [json.loads(line) for line in driven.run.metrics.read_text().splitlines() if '"val_loss"' in line][-1]
    assert result["val_loss"] == pytest.approx(last["val_loss"], abs=0.3)  # of more tokens than in training

    from transformers import GPT2LMHeadModel

    exported = GPT2LMHeadModel.from_pretrained(driven.run.path / "export")
    weights = dict(tiny.newest(driven.run).tensors("model/"))
    name = next(name for name in weights if "wte" in name or "embedding" in name)
    assert torch.equal(exported.transformer.wte.weight, weights[name][: exported.config.vocab_size])


@drives(drive_pipeline)
def test_the_same_command_again_does_what_is_missing(driven: Pipeline) -> None:
    assert driven.again.returncode == 0, driven.again.stderr
    assert "every unit is done already" in driven.again.stdout
    assert "finished at step" in driven.again.stdout
    assert "evaluation.json is there already" in driven.again.stdout
    assert "export.json is there already" in driven.again.stdout
    assert not re.findall(r"(?m)^job \d+", driven.again.stdout)


@long
def drive_hopeless(kit: Kit) -> list[Ended]:
    """A training that diverges at once: what waits for it must not wait forever."""
    folder = kit.folder / "hopeless"
    write_texts(folder)
    with kit.nodes() as nodes:
        done = command(kit, folder, nodes, "--optimizer.lr_multiplier=1e30", "--optimizer.grad_clip=1e30")
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = re.findall(r"(?m)^job (\d+):", done.stdout)
        run = RunDir(folder / "run")
        folders = (run.slurm, run.after / "evaluate", run.after / "export")
        jobs = [Job(number, run, where / f"{number}_0_log.out") for number, where in zip(numbers, folders, strict=True)]
        return [Ended(job, kit.until_ended(job)) for job in jobs]


@drives(drive_hopeless)
def test_nothing_pends_forever_behind_a_run_that_failed(driven: list[Ended]) -> None:
    train, *rest = driven
    assert train.slurm["ExitCode"] == "5:0", train.job.told()
    assert [each.slurm["JobState"] for each in rest] == ["CANCELLED"] * 2
    assert not [path for path in train.job.run.path.iterdir() if path.name in ("evaluation.json", "export")]


# What is said to Slurm, by a pipeline whose data is prepared and whose jobs may not begin yet, so that they need no node ---------


@pytest.fixture
def waiting(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Its words; the run is in RUN of this test."""
    monkeypatch.setenv("SLURM_CONF", kit.cluster.environment["SLURM_CONF"])
    (tmp_path / "site.yaml").write_text(f"{kit.site}\ncpus_per_task: 1\nsbatch: {{begin: now+3600}}\n")
    words = ["--nodes=1", "--nproc=2", "--time=10", f"--site={tmp_path / 'site.yaml'}", f"--run-dir={tmp_path / 'run'}"]
    flags = tiny.flags(tiny.config(kit.data, total_steps=4, eval_every=100))
    return [*words, *(flag for flag in flags if "manifest_sha256" not in flag)]  # which is the run's own


def numbers_in(told: str) -> list[str]:
    return re.findall(r"(?m)^job (\d+):", told)


def test_the_training_is_held_until_it_knows_what_waits_for_it(
    kit: Kit, waiting: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, genuine = RunDir(tmp_path / "run"), pipeline.Check.submit
    seen: list[tuple[str, bool]] = []

    def submit(self: pipeline.Check, run: RunDir, training: str | None) -> list[str]:
        assert training is not None
        seen.append((kit.cluster.job(training)["Reason"], run.dependents.exists()))
        return genuine(self, run, training)

    monkeypatch.setattr(pipeline.Check, "submit", submit)
    assert pipeline.main(waiting) == 0
    train, *rest = numbers_in(capsys.readouterr().out)
    assert seen == [("JobHeldUser", False)] * 2
    assert run.dependents.read_text().split() == rest
    assert kit.cluster.job(train)["Reason"] != "JobHeldUser"
    for number in rest:
        assert kit.cluster.job(number)["Dependency"].startswith(f"afterok:{train}")
    with pytest.raises(RunDirError, match=f"job {train} of --run-dir=.* is in the queue already"):
        pipeline.main(waiting)
    assert cancel.main([str(run.path)]) == 0
    assert {kit.cluster.job(number)["JobState"] for number in (train, *rest)} == {"CANCELLED"}


def test_a_check_that_is_refused_leaves_no_training_held(
    kit: Kit, waiting: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> list[str]:
        raise UsageError("sbatch refused the job")

    monkeypatch.setattr(pipeline.Check, "submit", refuse)
    with pytest.raises(UsageError):
        pipeline.main(waiting)
    (train,) = numbers_in(capsys.readouterr().out)
    assert kit.cluster.job(train)["Reason"] != "JobHeldUser"
    assert cancel.main([str(tmp_path / "run")]) == 0


def test_what_comes_after_a_finished_run_is_submitted_once_and_cancelled_with_it(
    kit: Kit, waiting: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it waits for the training, with which Slurm would cancel it."""
    run = RunDir(tmp_path / "run")
    assert tiny.run_ranks(run, tiny.config(kit.data, total_steps=4, eval_every=100), nproc=2) == 0
    assert pipeline.main(waiting) == 0
    evaluation, export = numbers_in(capsys.readouterr().out)
    assert pipeline.main(waiting) == 0
    told = capsys.readouterr().out
    assert f"evaluate: job {evaluation} is in the queue already" in told
    assert f"export: job {export} is in the queue already" in told
    assert numbers_in(told) == []
    assert cancel.main([str(run.path)]) == 0
    assert [kit.cluster.job(number)["JobState"] for number in (evaluation, export)] == ["CANCELLED"] * 2
