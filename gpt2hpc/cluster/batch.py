"""A training job for Slurm, packed and submitted by submitit: `#SBATCH` lines, set-up, srun, tear-down."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from gpt2hpc import durable
from gpt2hpc.cluster import compile_cache, job_environment, mounts, queries, run_jobs, script, submitter
from gpt2hpc.cluster.site_profile import OF_SIF, OWNED, Site
from gpt2hpc.errors import MissingError, UsageError
from gpt2hpc.run_dir import RunDir

SILENT = ("Unable to contact", "Could not establish a configuration source")
"""sbatch's words where no controller answers, or is known."""
OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables that say where jobs go, not what the one is that they are seen in."""


@dataclass(frozen=True)
class BatchJob:
    """What is asked of Slurm.

    Args:
        run: The run directory, absolute: every node must see it there.
        name: The job's name.
        nodes: Nodes.
        ranks_per_node: Ranks on each, one per GPU.
        gpus_per_node: 0 for none.
        minutes: Time limit of each attempt; None for the partition's default.
        stop_margin_s: Seconds before the limit at which Slurm signals, beside the clock that the ranks watch themselves.
        options: Further options of sbatch by their long names.
        site: The cluster's ways.
        image: Container image, or None.
        data_dir: The data, to be seen in the container too.
        begins_with: Checkpoints and weights that the run begins with, to be seen there as well.
        guard: A second job waits, and takes over where this one cannot requeue itself.
        dependency: What it waits for, in sbatch's words; None for nothing.
    """

    run: RunDir
    name: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    minutes: int | None
    stop_margin_s: int
    options: dict[str, Any]
    site: Site
    image: str | None
    data_dir: str
    begins_with: tuple[str, ...] = ()
    guard: bool = False
    dependency: str | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def log(self) -> str:
        """Where rank 0 and the batch script write; `%j` is the job's number."""
        return str(self.run.slurm / "%j_0_log.out")

    def set_up(self) -> list[str]:
        """The lines before srun."""
        variables = {
            "RUN_DIR": str(self.run.path),
            "DATA": self.data_dir,
            "PICKLES": str(self.run.slurm),
            "MASTER_ADDR_SUFFIX": self.site.master_addr_suffix,
            "GUARD": "1" if self.guard else "",
        }
        site = dataclasses.replace(self.site, binds=(*self.site.binds, *self.begins_with))
        return set_up_lines("set-up", variables, site, self.image)

    def mounts(self) -> list[str]:
        """What of the host the container sees, for a dry run."""
        named = [(str(self.run.path), "the run")]
        if self.data_dir:
            named.append((self.data_dir, "data.dir"))
        named += [(path, "what the run begins with") for path in self.begins_with]
        return mounts.described(self.site, self.image, named, gpus=self.gpus_per_node > 0)

    def parameters(self) -> dict[str, Any]:
        """What submitit makes the script from."""
        after = waiting(self.dependency) if self.dependency else {}
        return {
            "job_name": self.name,
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node,
            **self.site.gpu_request(self.gpus_per_node),
            "time": self.minutes,
            "signal_delay_s": self.stop_margin_s,
            "wckey": None,
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True, **switches(self.options), **after},
            "srun_args": srun_arguments(self.site),
            "setup": self.set_up(),
            "teardown": script.lines("tear-down"),
        }

    def text(self) -> str:
        """The whole batch script."""
        executor = self._executor()
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self, task: Callable[[], int]) -> str:
        """Hand the job to Slurm, each rank to run `task`; returns its number."""
        with refusals_explained(), as_from_a_login_shell(self.parameters()):
            return self._executor().submit(task).job_id

    def _executor(self) -> SlurmExecutor:
        return new_executor(self.run.slurm, self.parameters())


def set_up_lines(block: str, variables: Mapping[str, str], site: Site, image: str | None) -> list[str]:
    """The lines before srun: `variables` and how Python is run, the site's ways, then the block that reads them."""
    container = {"IMAGE": ""}
    ours = job_environment.of_site(site)
    # An image's own variables beat the host's, but not these.
    prefixes = ("", f"{site.runtime.upper()}ENV_") if image and site.runtime in OF_SIF else ("",)
    if image:
        container = {"IMAGE": image, "RUNTIME": site.runtime, "BINDS": ",".join(site.binds)}
        if site.runtime == "pyxis":
            computed = [*job_environment.COMPUTED, *job_environment.BY_THE_RANKS, compile_cache.PLACE]
            container["CONTAINER_ENV"] = ",".join(dict.fromkeys([*(each.name for each in ours), *computed]))
    exports = [f"export {prefix}{each.name}={shlex.quote(each.value)}" for each in ours for prefix in prefixes]
    every = {**variables, **container, "PYTHON": site.python or sys.executable}
    given = [f"{name}={shlex.quote(value)}" for name, value in every.items()]
    stale = 'rm -f "$PICKLES/${job}"_*.save_tmp # of an attempt that was killed; submitit would stumble over it'
    first = "trap : TERM USR1 USR2 # from the beginning"
    return [first, submitter.EXPORT, *given, *exports, *site.setup, *script.lines(block), stale]


def srun_arguments(site: Site) -> list[str]:
    """Those that each job needs, then the site's own."""
    own = [f"--{name.replace('_', '-')}" + (f"={value}" if value else "") for name, value in site.srun.items()]
    return [*script.SRUN_ARGS, *own]


@contextlib.contextmanager
def refusals_explained() -> Iterator[None]:
    """Raise MissingError or UsageError, in Slurm's own words, where it does not take a job."""
    if shutil.which("sbatch") is None:
        raise MissingError(
            "sbatch is not on PATH, so this machine cannot submit to Slurm; use a login node, or --cluster local"
        )
    try:
        yield
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
        said = _words(str(error))
        if any(words in said for words in SILENT):
            raise MissingError(
                f"Slurm does not answer: {said}; is SLURM_CONF right, and its controller up? --cluster local works on this machine"
            ) from error
        raise UsageError(f"sbatch refused the job: {said}") from error


@contextlib.contextmanager
def as_from_a_login_shell(parameters: Mapping[str, Any]) -> Iterator[None]:
    """Without the variables of a job that this process may be in, which sbatch would pass on, and srun refuse; and without those that
    would win over what the script itself asks for (sbatch(1), "INPUT ENVIRONMENT VARIABLES"). Whether a job may be requeued stays the
    user's to say, and its script copes."""
    asked = {**parameters, **parameters.get("additional_parameters", {})}
    written = [*(name for name, value in asked.items() if value is not None), *(set(OWNED) - {"time", "no-requeue"})]
    win = {_input_variable(option) for option in written}
    before = dict(os.environ)
    for name in before:
        if name in win or (name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name not in OF_THE_CLUSTER):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def _input_variable(option: str) -> str:
    word = option.upper().replace("-", "_")
    return "SBATCH_" + {"TIME": "TIMELIMIT", "MEM": "MEM_PER_NODE", "ARRAY": "ARRAY_INX"}.get(word, word)


def new_executor(folder: Path, parameters: Mapping[str, Any]) -> SlurmExecutor:
    """submitit's executor for scripts that run Python as their blocks have found it."""
    executor = _Executor(folder=folder, python='"${srun_python[@]}"')
    # Without them submitit sets a time limit and a wckey of its own.
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None or k in ("time", "wckey")})
    return executor


class _Executor(SlurmExecutor):
    """submitit's, which can write a script where there is no Slurm too."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def waiting(dependency: str) -> dict[str, str]:
    """Options of sbatch for a job that waits for others, and is cancelled, instead of pending forever, where they fail."""
    return {"dependency": dependency, "kill-on-invalid-dep": "yes"}


def switches(options: Mapping[str, Any]) -> dict[str, Any]:
    """`hold: true` is `--hold`, and `hold: false` is nothing."""
    words = {"true": True, "false": False}
    given = {name: words.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    return {name: value for name, value in given.items() if value is not False}


@contextlib.contextmanager
def as_before_if_refused(run: RunDir) -> Iterator[None]:
    """A job that Slurm does not take leaves nothing behind: neither its settings nor its files."""
    folders = [run.path, run.attempts, run.checkpoints, run.slurm]
    fresh = [folder for folder in folders if not folder.exists()]
    known, settings = set(run.slurm.glob("*")), run.config.read_bytes() if run.config.exists() else None
    try:
        yield
    except BaseException:
        for path in set(run.slurm.glob("*")) - known:
            path.unlink()
        if settings is None:
            run.config.unlink(missing_ok=True)
        else:
            durable.publish_bytes(run.config, settings)
        for folder in reversed(fresh):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def queued(run: RunDir) -> str | None:
    """The number of a job of this run that waits or runs, where squeue knows of one that is known to be of this run."""
    return queries.first_queued(run_jobs.numbers(run))


def _words(text: str) -> str:
    """sbatch's own words out of submitit's report."""
    said = dict.fromkeys(re.findall(r"sbatch: (?:error: |fatal: )?(.+)", text))
    return "; ".join(said) if said else " ".join(text.split())
