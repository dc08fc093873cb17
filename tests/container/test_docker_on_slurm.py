"""`--runtime docker` on a real Slurm, with the image of docker/Dockerfile; the engine is podman, which takes docker's commands."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gpt2hpc.config import Config
from tests import tiny
from tests.cluster.kit import SAVE_EVERY, Ended, Kit, finished_as, resumed_exactly
from tests.container import debian, machine
from tests.container.buildah import Engine

pytestmark = pytest.mark.timeout(1800)
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
"""A machine without CAP_SYS_RESOURCE grants no more than that."""


@dataclass
class DockerKit(Kit):
    """The same jobs in an image that Docker's commands run; root's, as whoever may talk to a daemon is."""

    image: str = ""
    programs: Path = Path()

    @property
    def site(self) -> str:
        return f"image: {self.image}\nruntime: docker\nbinds: [{self.folder}]"

    @property
    def variables(self) -> dict[str, str]:
        return {
            "IMAGE": self.image,
            "RUNTIME": "docker",
            "PATH": f"{self.programs}:{self.cluster.environment['PATH']}",
        }

    def settings(self, **checkpoint: float) -> Config:
        settings = super().settings(**checkpoint)
        return replace(settings, train=replace(settings.train, tokens_per_step=8192))


@pytest.fixture(scope="module")
def docker(engine: Engine) -> Iterator[Path]:
    """The folder of a `docker`, over the images that buildah has made."""
    debian.install("podman", "runc")
    folder = Path(tempfile.mkdtemp(prefix="gpt2hpc-docker-"))
    (folder / "containers.conf").write_text(CONTAINERS_CONF)
    store = shlex.join(map(str, engine.store.command()[1:]))
    program = folder / "docker"
    program.write_text(f'#!/bin/sh\nCONTAINERS_CONF={folder}/containers.conf exec /usr/bin/podman {store} "$@"\n')
    program.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def start_orphan(docker: Path, engine: Engine, job: str) -> None:
    """What a killed rank of an earlier start of the job may leave."""
    labels = [f"--label=gpt2hpc.job={job}", f"--label=gpt2hpc.start={job}.earlier"]
    options = ["--detach", "--rm", "--network=host", *labels, "--entrypoint", "sleep"]
    machine.run([docker / "docker", "run", *options, engine.image, "3000"])
    assert machine.run([docker / "docker", "ps", "--quiet", "--filter", f"label=gpt2hpc.job={job}"]) != ""


@pytest.fixture(scope="module")
def ended(kit: Kit, engine: Engine, docker: Path) -> dict[str, Ended]:
    """One that nobody disturbs, one of the template, one of submit; the latter two are preempted."""
    folder = kit.folder / "docker"
    tiny.make_data(folder / "data")
    own = DockerKit(kit.cluster, folder, kit.pairs, kit.python, image=engine.image, programs=docker)

    def job(how: str) -> Ended:
        with own.nodes() as nodes:
            if how == "submit":
                job = own.submit("by-submit", "--partition", "low", nodes=nodes)
            elif how == "sbatch":
                job = own.sbatch(how, "-p", "low", "-w", nodes, "--hold")
                start_orphan(docker, engine, job.number)
                kit.cluster.run("scontrol", "release", job.number)
            else:
                job = own.sbatch(how, "-p", "low", "-w", nodes)
            if how != "undisturbed":
                own.until_step(job, SAVE_EVERY + 5)
                own.preempt(nodes.split(",")[1])
            return Ended(job, own.until_ended(job, seconds=400))

    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(("undisturbed", "sbatch", "submit"), pool.map(job, ("undisturbed", "sbatch", "submit")), strict=True)
        )


@pytest.mark.parametrize("how", ["sbatch", "submit"])
def test_preempted_in_docker(ended: dict[str, Ended], how: str) -> None:
    finished_as(ended[how], ended["undisturbed"], causes=["preempted", "finished"])
    resumed_exactly(ended[how])


def test_no_container_is_left(ended: dict[str, Ended], docker: Path) -> None:
    """Nor one that was left by an earlier start."""
    assert machine.run([docker / "docker", "ps", "--quiet", "--filter", "label=gpt2hpc.job"]) == ""
