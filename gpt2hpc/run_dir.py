"""The names of every file in a run directory, in one place."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from gpt2hpc.errors import RunDirError


@dataclass(frozen=True)
class RunDir:
    """`runs/NAME/`: all that a run knows of itself, and all that a restart needs."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """The resolved settings; training reads only these."""
        return self.path / "config.yaml"

    @property
    def identity(self) -> Path:
        """A random word that tells this run from every other, in its checkpoints too."""
        return self.path / "identity"

    @property
    def quoted(self) -> str:
        """Its path as a word of a command to copy."""
        return shlex.quote(str(self.path))

    @property
    def attempts(self) -> Path:
        """One JSON file an attempt, claimed by exclusive creation: the ledger."""
        return self.path / "attempts"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number:04d}.json"

    def beat(self, attempt: int) -> Path:
        """Its signs of life."""
        return self.attempts / f"{attempt:04d}.beat"

    def unclaimed(self, job: str, restart: int) -> Path:
        """How a start ended that could not claim an attempt."""
        return self.attempts / f"unclaimed-{job}-{restart}.json"

    def refusal(self, job: str, restart: int) -> Path:
        """The user's error for which a start could not even begin."""
        return self.attempts / f"refused-{job}-{restart}.json"

    @property
    def supervisor(self) -> Path:
        """Who starts the ranks of a local run, as long as that goes on."""
        return self.attempts / "supervisor.json"

    @property
    def log(self) -> Path:
        """`step kind value`, a line each."""
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files, with `--train.tensorboard true`."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """What W&B's client keeps, with `--train.wandb PROJECT`; the name is the client's choice."""
        return self.path / "wandb"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def outcome(self) -> Path:
        """How the last orderly attempt ended."""
        return self.path / "outcome.json"

    @property
    def decision(self) -> Path:
        """What was decided when the last attempt had ended."""
        return self.path / "decision.json"

    @property
    def verified(self) -> Path:
        """Size and time of the shards whose hash was found right."""
        return self.path / "verified.json"

    @property
    def fetched(self) -> Path:
        """A checkpoint of elsewhere that the run begins with, until it has saved one of its own."""
        return self.path / "fetched"

    @property
    def micro_batch(self) -> Path:
        """What `--train.micro_batch_size auto` has found: a restart takes the same."""
        return self.path / "micro-batch.json"

    @property
    def uploads(self) -> Path:
        """What of the checkpoints is on the Hub, and what waits to go there."""
        return self.path / "uploads"

    @property
    def hellaswag(self) -> Path:
        """The examples that the Hub gave."""
        return self.path / "hellaswag.json"

    @property
    def samples(self) -> Path:
        """Texts that the model wrote on its way, a file a step."""
        return self.path / "samples"

    @property
    def dumps(self) -> Path:
        """What every thread was doing when an attempt hung, a folder an attempt."""
        return self.path / "dumps"

    def preflight(self, attempt: int, node: str) -> Path:
        """What a node writes there for a moment, to see whether all see it."""
        return self.path / f".preflight-{attempt:04d}-{node}"

    def dumps_of(self, attempt: int) -> Path:
        return self.dumps / f"{attempt:04d}"

    def dump(self, attempt: int, rank: int) -> Path:
        return self.dumps_of(attempt) / f"rank{rank}.txt"

    @property
    def report(self) -> Path:
        """The last report, for a browser."""
        return self.path / "report.html"

    @property
    def evaluation(self) -> Path:
        """What a pipeline's evaluation has measured."""
        return self.path / "evaluation.json"

    @property
    def exported(self) -> Path:
        """The model as a pipeline has exported it."""
        return self.path / "export"

    @property
    def slurm(self) -> Path:
        """Scripts, logs and pickles of Slurm jobs."""
        return self.path / "slurm"

    @property
    def jobs(self) -> Path:
        """The numbers of jobs that were submitted again, a line each."""
        return self.slurm / "jobs"

    @property
    def resume_script(self) -> Path:
        """Submits the run again, as its last job was."""
        return self.slurm / "resume.sh"

    @property
    def dependents(self) -> Path:
        """The numbers of jobs that wait for the run to finish, a line each."""
        return self.slurm / "dependents"

    @property
    def after(self) -> Path:
        """Logs and pickles of jobs that are no part of the training and come after it, as those of a pipeline, a folder each verb."""
        return self.slurm / "after"

    @property
    def guard(self) -> Path:
        """The number of the job that waits to take over, if there is one, and of the job that it guards."""
        return self.slurm / "guard"

    @property
    def job_logs(self) -> Path:
        """`JOB PATH`, a line each time that a batch script starts: where Slurm keeps what it prints."""
        return self.slurm / "logs"

    @property
    def finished(self) -> Path:
        """There once the last step is done."""
        return self.path / "FINISHED"

    @property
    def stop(self) -> Path:
        """`touch STOP` is a user's wish to stop."""
        return self.path / "STOP"

    def sample(self, step: int) -> Path:
        return self.samples / f"step{step:07d}.txt"

    @property
    def has_checkpoints(self) -> bool:
        """Whether something was saved, so that the run has settings and data to be true to."""
        return any(path.suffix != ".tmp" for path in self.checkpoints.glob("*_step*"))

    @property
    def rank_logs(self) -> Path:
        """What the ranks of local jobs printed, but for rank 0, which has the terminal."""
        return self.path / "logs"

    def rank_log(self, job: str, restart: int, rank: int) -> Path:
        """What a rank of a local job printed."""
        return self.rank_logs / f"{job}_{restart}_rank{rank}.log"

    def trace(self, rank: int) -> Path:
        """The sample numbers that a rank consumed, with `--train.trace_data true`."""
        return self.path / "trace" / f"rank{rank:05d}.jsonl"

    def create(self) -> None:
        """Make the directory and those in it; RunDirError where that is not allowed."""
        try:
            for folder in (self.path, self.attempts, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-test"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise RunDirError(
                f"--run-dir={self.path} cannot be written ({error.strerror}); choose a directory you own"
            ) from error
