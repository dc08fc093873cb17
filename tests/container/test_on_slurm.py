"""Training inside the image on a real Slurm, by a user without rights, from a login node without torch."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gpt2hpc import __version__
from gpt2hpc.config import Config
from gpt2hpc.data import catalog
from gpt2hpc.run_dir import RunDir
from tests import tiny
from tests.cluster import slurm
from tests.cluster.kit import ROOT, SAVE_EVERY, Ended, Job, Kit, finished_as, resumed_exactly
from tests.container import apptainer, machine
from tests.container.image import Image

PREPARE = ROOT / "slurm" / "prepare_array.sbatch"
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

    def prepared(how: str) -> Ended:
        """The array's tasks tokenize in the image, by the template or by submitit."""
        texts, out = folder / "texts.jsonl", folder / f"prepared-{how}"
        texts.write_text("".join(json.dumps({"text": f"Document {number}."}) + "\n" for number in range(400)))
        with own.nodes() as nodes:
            node = nodes.split(",")[0]
            if how == "sbatch":
                (folder / "prepare.sbatch").write_bytes(PREPARE.read_bytes())
                flags = ["--array=0-1", "--cpus-per-task=1", "-w", node, f"--output={folder}/prepare-%a.log"]
                command = ["sbatch", "--parsable", *flags, str(folder / "prepare.sbatch"), "--unit-tokens", "500"]
                variables = {**own.variables, "SOURCE": str(texts), "OUT": str(out)}
                number = own._run(command, variables).strip()
            else:
                site = folder / "prepare.yaml"
                site.write_text(f"{own.site}\nsbatch: {{nodelist: {node}}}\n")
                words = ["--source", str(texts), "--out", str(out), "--unit-tokens", "500", "--cpus-per-task", "1"]
                told = own._run([login, "-m", "gpt2hpc.submit", "prepare", *words, f"--site={site}"], {})
                number = told.split("then job ")[1].split()[0]
            job = Job(number, RunDir(out), folder / "prepare-0.log")
            return Ended(job, own.until_ended(job))

    with ThreadPoolExecutor(4) as pool:
        calls: dict[str, Callable[[], Ended]] = {
            "prepared by sbatch": lambda: prepared("sbatch"),
            "prepared by submit": lambda: prepared("submit"),
            "undisturbed": undisturbed,
            "sbatch": lambda: preempted("sbatch"),
            "submit": lambda: preempted("submit"),
        }
        futures = {name: pool.submit(call) for name, call in calls.items()}
        yield {name: future.result() for name, future in futures.items()}


def doctor(image: Image, conf: Path, *flags: str | Path) -> tuple[int, dict[str, tuple[str, str]]]:
    """Of a login node without torch: exit code, and state and text by name."""
    user = machine.user_environment()
    environment = {**user, "PATH": f"{image.apptainer.parent}:{user['PATH']}", "SLURM_CONF": str(conf)}
    command = machine.as_user(apptainer.login_python(), "-m", "gpt2hpc", "doctor", "--json", *flags)
    done = subprocess.run(command, env=environment, cwd=image.home, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, {each["name"]: (each["state"], each["text"]) for each in json.loads(done.stdout)}


def test_the_doctor_of_a_login_node_without_torch(kit: Kit, image: Image, tmp_path: Path) -> None:
    conf = kit.cluster.directory / "slurm.conf"
    code, found = doctor(image, conf)
    assert (code, found["torch"][0], "--container" in found["torch"][1]) == (8, "MISSING", True)
    code, found = doctor(image, conf, "--container", image.file)
    assert code == 0, found
    names = ("apptainer", "user namespaces", "FUSE", "image", "python of ranks", "torch", "sbatch")
    assert [found[name][0] for name in names] == ["OK"] * len(names)
    assert found["image"][1].endswith(f"gpt2hpc {__version__} as here")
    assert found["ProctrackType"][0] == ("OK" if slurm.best_proctrack() == "cgroup" else "WARN")


@pytest.mark.parametrize("how", ["sbatch", "submit"])
def test_preempted_in_the_image(ended: dict[str, Ended], how: str) -> None:
    finished_as(ended[how], ended["undisturbed"], causes=["preempted", "finished"])
    resumed_exactly(ended[how])
    assert ended[how].slurm["UserId"].startswith(f"{machine.USER}(")


@pytest.mark.parametrize("how", ["sbatch", "submit"])
def test_prepared_in_the_image(ended: dict[str, Ended], how: str, tmp_path: Path) -> None:
    out = ended[f"prepared by {how}"].job.run.path
    here = tiny.gpt2hpc("prepare", "--source", out.parent / "texts.jsonl", "--out", tmp_path, "--unit-tokens", "500")
    assert here.returncode == 0, here.stderr
    found, expected = catalog.load(str(out)), catalog.load(str(tmp_path))
    assert len(expected.shards) > 2
    assert found.shards == expected.shards
    assert (out / found.shards[0].file).stat().st_uid == machine.user().pw_uid
