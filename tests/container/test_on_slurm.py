"""Jobs inside the image on a real Slurm, of a user without rights, submitted from a login node without torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
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
from tests.cluster.kit import ROOT, SAVE_EVERY, Ended, Job, Kit, finished_as, new_kit, resumed_exactly
from tests.cluster.test_pipeline import SETTINGS, STEPS, write_texts
from tests.container import apptainer, machine
from tests.container.apptainer import TOKEN
from tests.container.image import Image

PREPARE = ROOT / "slurm" / "prepare_array.sbatch"
pytestmark = pytest.mark.timeout(1800)


@dataclass
class ImageKit(Kit):
    """The same jobs, by the unprivileged user and in the image; nothing slows them down but their size."""

    image: Path = field(default_factory=Path)
    programs: Path = field(default_factory=Path)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def site(self) -> str:
        return f"image: {self.image}\nbinds: [{self.folder}]"

    @property
    def variables(self) -> dict[str, str]:
        return {"IMAGE": str(self.image)}

    def settings(self, **checkpoint: float) -> Config:
        settings = super().settings(**checkpoint)
        return replace(settings, train=replace(settings.train, tokens_per_step=4096))

    def _run(self, command: Sequence[str], variables: dict[str, str]) -> str:
        user = machine.user_environment()
        path = f"{self.programs}:{user['PATH']}"
        environment = {**user, "PATH": path, "SLURM_CONF": str(self.cluster.directory / "slurm.conf")}
        self._give_to_user()
        done = subprocess.run(
            [*self.cluster.prefix, *machine.as_user(*command)],
            env={**environment, **self.environment, **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _give_to_user(self) -> None:
        owner = machine.user()
        for path in (self.folder, *self.folder.iterdir()):
            os.chown(path, owner.pw_uid, owner.pw_gid)


def hostile(folder: Path) -> dict[str, str]:
    """What a login shell may hand on: another Python's torch, conda's compilers, a library that is not inside, a secret."""
    leak = folder / "leak"
    leak.mkdir()
    (leak / "torch.py").write_text("raise SystemExit('the host leaks in')\n")
    return {
        "PYTHONPATH": str(leak),
        "LD_PRELOAD": "/nowhere/libprofile.so",
        "CC": "/nowhere/conda/bin/x86_64-conda-linux-gnu-cc",
        "CFLAGS": "-march=nocona -isystem /nowhere/conda/include",
        "CONDA_PREFIX": "/nowhere/conda",
        "CONDA_DEFAULT_ENV": "base",
        "APPTAINER_CLEANENV": "1",
        "HF_TOKEN": TOKEN,
    }


@dataclass
class Watched:
    """What was seen of the secret in the command lines of this machine's processes."""

    seen: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self.over.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = path.read_bytes()
                except OSError:
                    continue
                if TOKEN.encode() in words:
                    self.seen.append(words.replace(b"\0", b" ").decode(errors="replace"))


@pytest.fixture(scope="module")
def folder(image: Image) -> Path:
    path = image.home / "kit"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def isolated(image: Image) -> Iterator[slurm.Cluster]:
    """A Slurm that has no network but the loopback, and signals every process of a task."""
    with tempfile.TemporaryDirectory(prefix="gpt2hpc-isolated-") as name:
        cluster = slurm.Cluster(Path(name) / "slurm", image.prefix)
        Path(name).chmod(0o755)
        # Slurm looks up its own addresses by a call that passes over 127.0.0.1; this one leads nowhere either.
        machine.run([*image.prefix, "ip", "address", "replace", "192.0.2.1/32", "dev", "lo"])
        cluster.start(nodes=2, proctrack="linuxproc")
        yield cluster
        cluster.stop()


@pytest.fixture(scope="module")
def secrets() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def ended(kit: Kit, image: Image, folder: Path, isolated: slurm.Cluster, secrets: Watched) -> dict[str, Ended]:
    """Jobs at once: one that nobody disturbs, three that are preempted, two that prepare, and a pipeline."""
    template = folder / "train.sbatch"
    template.write_bytes(kit.template.read_bytes())
    tiny.make_data(folder / "data")
    login, programs = str(apptainer.login_python()), image.apptainer.parent
    assert subprocess.run([login, "-c", "import torch"], capture_output=True, check=False).returncode == 1
    environment = hostile(folder)
    own = ImageKit(
        kit.cluster, folder, kit.pairs, login, template, image=image.file, programs=programs, environment=environment
    )
    alone = replace(own, cluster=isolated, pairs=new_kit(isolated, folder / "isolated", pairs=1).pairs)

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

    def preempted_alone() -> Ended:
        """Without a network or a home, and where Slurm would signal what serves the image's files."""
        with alone.nodes() as nodes:
            job = alone.sbatch("alone", "-p", "low", "-w", nodes, env={"APPTAINER_NO_MOUNT": "home"})
            alone.until_step(job, SAVE_EVERY + 5)
            alone.preempt(nodes.split(",")[1])
            return Ended(job, alone.until_ended(job, seconds=400))

    def prepared(how: str) -> Ended:
        """The array's tasks tokenize in the image, by the template or by submitit."""
        texts, out = folder / f"texts-{how}.jsonl", folder / f"prepared-{how}"
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

    def pipeline() -> Ended:
        """From texts to an exported model, every job of it in the image."""
        write_texts(folder / "pipeline")
        run, site = RunDir(folder / "pipeline" / "run"), folder / "pipeline.yaml"
        with own.nodes() as nodes:
            node = nodes.split(",")[0]
            site.write_text(f"{own.site}\nsbatch: {{nodelist: {node}}}\ncpus_per_task: 1\n")
            words = ["--nproc=2", "--time=10", f"--site={site}", f"--run-dir={run.path}"]
            words += [f"--data.dir={folder}/pipeline/data", f"--source={folder}/pipeline/texts"]
            words += ["--prepare", "--array 2 --unit-tokens 20000 --cpus-per-task 1", "--evaluate", "--val-tokens 4096"]
            os.chown(folder / "pipeline", machine.user().pw_uid, machine.user().pw_gid)
            told = own._run([login, "-m", "gpt2hpc.submit", "pipeline", *words, *SETTINGS], {})
            numbers = re.findall(r"(?m)^job (\d+):", told)
            for number in numbers:
                job = Job(number, run, run.after / "export" / f"{number}_0_log.out")
                facts = own.until_ended(job, seconds=600)
            return Ended(job, facts)

    calls: dict[str, Callable[[], Ended]] = {
        "alone": preempted_alone,
        "pipeline": pipeline,
        "undisturbed": undisturbed,
        "sbatch": lambda: preempted("sbatch"),
        "submit": lambda: preempted("submit"),
        "prepared by sbatch": lambda: prepared("sbatch"),
        "prepared by submit": lambda: prepared("submit"),
    }
    watch = threading.Thread(target=secrets.look)
    watch.start()
    with ThreadPoolExecutor(5) as pool:
        futures = {name: pool.submit(call) for name, call in calls.items()}
        results = {name: future.result() for name, future in futures.items()}
    secrets.over.set()
    watch.join()
    return results


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
    names = ("apptainer", "user namespaces", "FUSE", "image", "python of ranks", "torch", "sbatch", "ProctrackType")
    assert [found[name][0] for name in names] == ["OK"] * len(names)
    assert found["image"][1].endswith(f"gpt2hpc {__version__} as here")
    assert ("unpacked" in found["ProctrackType"][1]) == (slurm.best_proctrack() != "cgroup")


@pytest.mark.parametrize("how", ["sbatch", "submit", "alone"])
def test_preempted_in_the_image(ended: dict[str, Ended], how: str) -> None:
    """In a hostile environment; `alone` without network and home."""
    finished_as(ended[how], ended["undisturbed"], causes=["preempted", "finished"])
    resumed_exactly(ended[how])
    assert ended[how].slurm["UserId"].startswith(f"{machine.USER}(")
    inside = [line for line in ended[how].job.told().splitlines() if re.match(r"\d+: ", line)]
    assert not [line for line in inside if "ld.so" in line or "leaks in" in line]


def test_where_slurm_signals_what_serves_an_image_it_is_unpacked_first(ended: dict[str, Ended]) -> None:
    """A mounted one would be gone, and the ranks end with a bus error instead of a save."""
    assert ended["alone"].job.told().count("the image is unpacked to /tmp/gpt2hpc-") == 2
    by_fuse = slurm.best_proctrack() == "cgroup"
    assert ("unpacked" in ended["sbatch"].job.told()) != by_fuse


def test_there_is_no_network_in_the_isolated_job(ended: dict[str, Ended], isolated: slurm.Cluster) -> None:
    """What the job proves, it proves under this."""
    pids = [int(line.split()[0]) for line in (isolated.directory / "pids").read_text().splitlines()]
    for pid in pids:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
        assert [line.split(":")[0].strip() for line in lines[2:]] == ["lo"]


@pytest.mark.parametrize("how", ["sbatch", "submit"])
def test_prepared_in_the_image(ended: dict[str, Ended], how: str, tmp_path: Path) -> None:
    out = ended[f"prepared by {how}"].job.run.path
    texts = out.parent / f"texts-{how}.jsonl"
    here = tiny.gpt2hpc("prepare", "--source", texts, "--out", tmp_path, "--unit-tokens", "500")
    assert here.returncode == 0, here.stderr
    found, expected = catalog.load(str(out)), catalog.load(str(tmp_path))
    assert len(expected.shards) > 2
    assert found.shards == expected.shards
    for shard in expected.shards:
        assert (out / shard.file).read_bytes() == (tmp_path / shard.file).read_bytes()
    assert (out / found.shards[0].file).stat().st_uid == machine.user().pw_uid


def test_a_pipeline_in_the_image(ended: dict[str, Ended]) -> None:
    run = ended["pipeline"].job.run
    assert ended["pipeline"].slurm["JobState"] == "COMPLETED", ended["pipeline"].job.told()
    assert tiny.newest(run).step == STEPS
    (result,) = json.loads((run.path / "evaluation.json").read_text())
    assert result["val_tokens"] > 0
    assert (run.path / "export" / "model.safetensors").exists()


def test_a_secret_stays_in_the_environment(ended: dict[str, Ended], secrets: Watched, folder: Path) -> None:
    """It is in no script, log or other file of a run, and in no process's command line."""
    rank = next(iter(folder.glob("runs/by-submit/slurm/*.sh")), None)
    assert rank is not None, "there are no scripts to look at"
    found = subprocess.run(["grep", "-rl", TOKEN, str(folder)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert secrets.seen == []
