"""Training inside the image on a real Slurm, by a user without rights, from a login node without torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gpt2hpc.config import Config
from tests import tiny
from tests.cluster import slurm
from tests.cluster.kit import SAVE_EVERY, Ended, Kit, finished_as, resumed_exactly
from tests.container import apptainer, machine
from tests.container.image import Image

pytestmark = pytest.mark.timeout(1200)


@dataclass
class ImageKit(Kit):
    """The same jobs, by the unprivileged user and in the image; nothing slows them down but their size."""

    image: Path = field(default_factory=Path)
    programs: Path = field(default_factory=Path)

    @property
    def site(self) -> str:
        return f"image: {self.image}\nbinds: [{self.folder}]"

    @property
    def variables(self) -> dict[str, str]:
        return {"IMAGE": str(self.image)}

    def settings(self, **checkpoint: float) -> Config:
        settings = super().settings(**checkpoint)
        return replace(settings, train=replace(settings.train, tokens_per_step=2048))

    def _run(self, command: Sequence[str], variables: dict[str, str]) -> str:
        user = machine.user_environment()
        path = f"{self.programs}:{user['PATH']}"
        environment = {**user, "PATH": path, "SLURM_CONF": str(self.cluster.directory / "slurm.conf"), **variables}
        self._give_to_user()
        done = subprocess.run(
            machine.as_user(*command), env=environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _give_to_user(self) -> None:
        owner = machine.user()
        for path in (self.folder, *self.folder.iterdir()):
            os.chown(path, owner.pw_uid, owner.pw_gid)


@pytest.fixture(scope="module")
def ended(kit: Kit, image: Image) -> Iterator[dict[str, Ended]]:
    """Three jobs at once: one that nobody disturbs, two that are preempted."""
    folder = image.home / "kit"
    folder.mkdir()
    template = folder / "train.sbatch"
    template.write_bytes(kit.template.read_bytes())
    tiny.make_data(folder / "data")
    login, programs = str(apptainer.login_python()), image.apptainer.parent
    file = image.file if slurm.best_proctrack() == "cgroup" else apptainer.unpacked(image.file)
    own = ImageKit(kit.cluster, folder, kit.pairs, login, template, image=file, programs=programs)
    assert subprocess.run([login, "-c", "import torch"], capture_output=True, check=False).returncode == 1

    def undisturbed() -> Ended:
        with own.nodes() as nodes:
            job = own.sbatch("undisturbed", "-w", nodes)
            return Ended(job, own.until_ended(job))

    def preempted(how: str) -> Ended:
        with own.nodes() as nodes:
            if how == "sbatch":
                job = own.sbatch("by-sbatch", "-p", "low", "-w", nodes)
            else:
                job = own.submit("by-submit", "--partition", "low", nodes=nodes)
            own.until_step(job, SAVE_EVERY + 5)
            own.preempt(nodes.split(",")[1])
            return Ended(job, own.until_ended(job))

    with ThreadPoolExecutor(3) as pool:
        calls: dict[str, Callable[[], Ended]] = {
            "undisturbed": undisturbed,
            "sbatch": lambda: preempted("sbatch"),
            "submit": lambda: preempted("submit"),
        }
        futures = {name: pool.submit(call) for name, call in calls.items()}
        yield {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("how", ["sbatch", "submit"])
def test_preempted_in_the_image(ended: dict[str, Ended], how: str) -> None:
    finished_as(ended[how], ended["undisturbed"], causes=["preempted", "finished"])
    resumed_exactly(ended[how])
    assert ended[how].slurm["UserId"].startswith(f"{machine.USER}(")
