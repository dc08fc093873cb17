"""A run that a person watches and steers by its directory alone, from its first wait in the queue to its end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc import cancel
from gpt2hpc.cluster import orders
from gpt2hpc.cluster.ledger import Decision, Ledger
from gpt2hpc.run_dir import RunDir
from tests.cluster.kit import Ended, Job, Kit, bytes_of, drives, logged_once, long
from tests.cluster.terminal import CTRL_C, terminal
from tests.cluster.test_training import drive_sbatch
from tests.tiny import gpt2hpc

pytestmark = pytest.mark.timeout(1200)


@dataclass
class Steered:
    """What was said at each step of a drive, by name."""

    kit: Kit
    job: Job
    said: dict[str, str] = field(default_factory=dict)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    followed: str = ""
    watched: tuple[str, int] = ("", -1)
    slurm: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return {**self.kit.cluster.environment, **self.kit.variables, "KIT_PACE_S": "0.3"}

    def call(self, step: str, verb: str, *more: str) -> str:
        """`gpt2hpc VERB RUN`, on a terminal but for JSON, which programs read from a pipe."""
        command = [sys.executable, "-m", "gpt2hpc", verb, str(self.job.run.path), *more]
        if "--json" not in more:
            command = ["script", "--quiet", "--return", "--command", shlex.join(command), "/dev/null"]
        done = subprocess.run(
            command,
            env={**self.env, "TERM": "xterm"},
            cwd=self.kit.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        self.said[step] = (done.stdout + done.stderr).replace("\r\n", "\n")
        assert done.returncode == 0, f"{step}: {self.said[step]}"
        return self.said[step]

    def status(self, step: str) -> dict[str, Any]:
        self.shown[step] = json.loads(self.call(step, "status", "--json"))[0]
        return self.shown[step]

    def until_state(self, step: str, *states: str) -> None:
        self.kit.until(self.job, lambda: self.status(step)["state"] in states, f"{' or '.join(states)} ({step})")

    def resume(self, step: str, *options: str) -> None:
        """By another job, from now on the one that is looked at."""
        number = re.findall(r"submitted again as job (\d+)", self.call(step, "resume", *options))[0]
        self.job = replace(self.job, number=number, log=Path(str(self.job.log).replace(self.job.number, number)))


@long
def drive_steered(kit: Kit) -> Steered:
    with kit.nodes() as nodes:
        run = Steered(kit, kit.sbatch("steered", "-p", "low", "-w", nodes, env={"KIT_PACE_S": "0.3"}))
        kit.until_step(run.job, 5)
        run.status("running")
        follow = subprocess.Popen(
            [sys.executable, "-m", "gpt2hpc", "logs", "-f", "-n", "0", str(run.job.run.path)],
            env=run.env,
            cwd=kit.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            kit.until(run.job, lambda: run.job.step() >= 10, "step 10")
            pace = run.job.run.path / "pace"
            pace.write_text("2")  # however busy this machine is, the run is not finished before it has been steered
            kit.preempt(nodes.split(",")[0])
            kit.until(run.job, lambda: kit.shown(run.job)["JobState"] == "PENDING", "the requeue")
            kit.cluster.run("scontrol", "update", f"JobId={run.job.number}", "StartTime=now+600")  # time to look at it
            run.until_state("pending", "pending")
            kit.until(run.job, lambda: run.status("pending")["slurm_reason"] is not None, "Slurm's reason for the wait")
            kit.cluster.run("scontrol", "update", f"JobId={run.job.number}", "StartTime=now")
            kit.until(run.job, lambda: len(run.job.attempts) > 1, "the restart")
            with terminal("status", "--watch", "--every", "1", env=run.env, cwd=kit.folder) as watching:
                watching.until("running")
                watching.until("\x1b[1A\x1b[2K")
                code = watching.press(CTRL_C)
            run.watched = watching.seen, code
            kit.until_step(run.job, run.job.attempts[-1]["first_step"] + 3)
            run.call("stop", "stop")
            run.until_state("stopped", "stopped")
            run.followed = follow.communicate(timeout=120)[0]
        finally:
            follow.kill()
            follow.wait()
        _held_and_cancelled(run)
        _killed_and_taken_out(run)
        pace.unlink()
        run.call("finish", "resume")
        number = re.findall(r"again as job (\d+)", run.said["finish"])[0]
        run.job = replace(run.job, number=number)
        run.slurm = kit.until_ended(run.job, seconds=300)
        run.status("finished")
        for verb in ("stop", "cancel", "resume"):
            run.call(f"{verb} when finished", verb)
        return run


def _held_and_cancelled(run: Steered) -> None:
    run.resume("resume held", "--", "--hold")
    run.status("held")
    run.call("release", "resume")
    run.kit.until(run.job, lambda: run.job.attempts[-1]["job"] == run.job.number, "the released start")
    run.call("resume while it runs", "resume")
    run.kit.until_step(run.job, run.job.attempts[-1]["first_step"] + 3)
    run.call("cancel", "cancel")
    run.until_state("cancelled", "cancelled")


def _killed_and_taken_out(run: Steered) -> None:
    run.resume("resume cancelled")
    run.kit.until(run.job, lambda: run.job.attempts[-1]["job"] == run.job.number, "the start after the cancelling")
    os.kill(run.kit.cluster.batch_shell(run.job.number), signal.SIGKILL)
    run.kit.until_ended(run.job)
    run.kit.until(
        run.job, lambda: run.status("killed")["state"] not in ("running", "ending"), "what became of the killed one"
    )
    run.resume("resume later", "--", "--begin=now+600")
    run.status("begin")
    run.call("stop in the queue", "stop")
    run.status("taken out")
    run.slurm = run.kit.shown(run.job)
    run.said["taken out of Slurm"] = run.slurm["JobState"]
    run.said["STOP is left"] = str(run.job.run.stop.exists())


@drives(drive_steered)
def test_status_tells_what_a_run_does(driven: Steered) -> None:
    shown = driven.shown
    running = shown["running"]
    assert (running["state"], running["steps"], running["slurm_state"]) == ("running", 100, "RUNNING")
    assert running["tokens_per_s"] > 0
    assert running["eta_s"] > 0
    assert running["left_s"] <= running["limit_s"]
    pending = shown["pending"]
    assert pending["slurm_reason"] == "BeginTime"
    assert pending["waits"].startswith("BeginTime: it may not start before its begin time")
    assert f"job {running['job']} waits: BeginTime" in pending["detail"]
    assert shown["held"]["next"] == f"scontrol release {shown['held']['job']}"
    assert shown["killed"]["state"] == "crashed"
    assert "JobLaunchFailure" in shown["killed"]["detail"]
    assert shown["killed"]["next"] == f"gpt2hpc resume {driven.job.run.path}"
    assert shown["finished"]["state"] == "finished"
    assert sum(shown["finished"]["restarts"].values()) == shown["finished"]["attempts"] - 1 == 4


@drives(drive_steered)
def test_watching_on_a_terminal_ends_with_ctrl_c(driven: Steered) -> None:
    seen, code = driven.watched
    assert code == 0
    assert "steered" in seen
    assert "Traceback" not in seen


@drives(drive_steered)
def test_a_log_is_followed_through_a_requeue_to_the_stop(driven: Steered) -> None:
    lines = driven.followed.splitlines()
    steps = [
        int(line.split()[2].split("/")[0])
        for line in lines
        if line.startswith("0: step") and " loss " in line and " lr " in line
    ]
    assert steps == list(range(steps[0], steps[-1] + 1)), "each step once"
    assert any("requeue: preempted" in line for line in lines)
    assert any("attempt 2: job" in line for line in lines)
    assert "gpt2hpc: steered: stopped, stopped by the user" in lines[-1]


@drives(drive_sbatch, drive_steered)
def test_a_steered_run_ends_with_the_same_bytes(driven: list[Any]) -> None:
    undisturbed, run = driven
    assert isinstance(undisturbed, Ended)
    said = run.said
    assert "stopped, step" in said["stop"]
    assert "was held (JobHeldUser) and is released" in said["release"]
    assert "is in the queue already: " in said["resume while it runs"]
    assert "cancelled; step" in said["cancel"]
    assert "is out of the queue: nothing is lost" in said["stop in the queue"]
    assert run.shown["begin"]["waits"].startswith("BeginTime")
    assert run.shown["taken out"]["state"] in ("stopped", "cancelled")
    assert (said["taken out of Slurm"], said["STOP is left"]) == ("CANCELLED", "False")
    assert run.slurm["JobState"] == "COMPLETED"
    for verb in ("stop", "cancel", "resume"):
        assert "finished" in said[f"{verb} when finished"]
    assert bytes_of(run.job) == bytes_of(undisturbed.job)
    logged_once(run.job)


@drives(drive_steered)
def test_logs_of_one_attempt(driven: Steered) -> None:
    first, second = (
        driven.call(f"logs {number}", "logs", "--attempt", str(number), "--rank", "0") for number in (1, 2)
    )
    assert "starting at step 0" in first
    assert "(preempted), checkpoint saved" in first
    assert "resuming at step" in second
    assert "(stopped), checkpoint saved" in second
    assert "attempt 2" not in first


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_job_that_requeues_itself_meanwhile_is_cancelled_too(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its batch shell has decided so, and does it just before, or just after, Slurm is told to cancel the job."""
    run, log = RunDir(kit.folder / "runs" / f"requeued-{when}"), kit.folder / f"requeued-{when}.log"
    run.create()
    run.slurm.mkdir(exist_ok=True)
    shell = "trap 'sleep 2; exit 6' TERM; echo ready; sleep 600 & wait"
    with kit.nodes() as nodes:
        flags = ["--requeue", "-w", nodes.split(",")[0], f"--output={log}"]
        job = Job(kit.cluster.run("sbatch", "--parsable", *flags, "--wrap", shell), run, log)
        run.jobs.write_text(f"{job.number}\n")
        kit.until(job, lambda: "ready" in job.told(), "the start")
        Ledger(run).remember(Decision(job.number, 0, "requeue", "preempted at step 7"))
        acts = [lambda: kit.cluster.run("scontrol", "requeue", job.number)]  # once
        genuine = orders.cancel

        def cancelled(numbers: list[str]) -> None:
            for act in acts if when == "before" else []:
                act()
            genuine(numbers)
            for act in acts if when == "after" else []:
                act()
            acts.clear()

        monkeypatch.setattr(orders, "cancel", cancelled)
        monkeypatch.setenv("SLURM_CONF", kit.cluster.environment["SLURM_CONF"])
        assert cancel.main([str(run.path)]) == 0
        kit.until(job, lambda: kit.shown(job)["JobState"] != "COMPLETING", "its end")
        state = kit.shown(job)["JobState"]
        kit.cluster.run("scancel", job.number)
    assert state == "CANCELLED"


def test_a_job_of_a_template_that_has_never_started_is_named(kit: Kit) -> None:
    """No run knows it yet, and a job that is of another kind, or known to its run, is not named."""
    job = kit.sbatch("never begun", "--hold", "--job-name=mine-and-waiting")
    other = kit.cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true")
    try:
        for verb in ("status", "stop", "cancel"):
            done = gpt2hpc(verb, job.run.path, env=kit.cluster.environment)
            assert done.returncode == 9, done.stdout + done.stderr
            assert f"{job.number} (mine-and-waiting)" in done.stderr
            assert other not in done.stderr
            assert len(done.stderr.splitlines()) == 1
    finally:
        kit.cluster.run("scancel", job.number, other)
    assert job.number not in gpt2hpc("cancel", job.run.path, env=kit.cluster.environment).stderr
