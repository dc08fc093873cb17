"""The doctor's checks, as far as they judge what others have said: texts, settings and facts go in, findings come out."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt2hpc import __version__, doctor
from gpt2hpc.checks import (
    asked,
    container,
    disk,
    gpu,
    interpreter,
    limits,
    network,
    programs,
    python,
    rounds,
    slurm,
    tokens,
)
from gpt2hpc.checks.interpreter import Facts, Probe
from gpt2hpc.checks.programs import ask
from gpt2hpc.checks.rounds import Group
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import file_system, inventory
from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.config import CheckpointConfig, Config, DataConfig
from gpt2hpc.finding import Finding, ok
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint
from tests import tiny

JOB = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n1"}
SETTINGS = {"PreemptType": "preempt/partition_prio", "KillWait": "20 sec", "PreemptMode": "REQUEUE"}
PARTITIONS = {
    "low": {"Nodes": "n[1-4]", "PriorityTier": "1", "PreemptMode": "REQUEUE", "GraceTime": "30"},
    "low0": {"Nodes": "n[1-4]", "PriorityTier": "1", "PreemptMode": "CANCEL", "GraceTime": "0"},
    "high": {"Nodes": "n4", "PriorityTier": "10", "PreemptMode": "OFF", "GraceTime": "0"},
    "apart": {"Nodes": "m[1-4]", "PriorityTier": "1", "PreemptMode": "REQUEUE", "GraceTime": "0"},
    "frozen": {"Nodes": "n[1-4]", "PriorityTier": "1", "PreemptMode": "GANG,SUSPEND", "GraceTime": "0"},
}
# As nvidia-smi writes it for the columns of gpu.BASIC and gpu.MORE.
HEALTHY = "0, NVIDIA H100 80GB HBM3, 535.104.05, 81559, 4, Default, Enabled, 0, Disabled, Enabled"
ILL = "1, NVIDIA H100 80GB HBM3, 535.104.05, 81559, 40960, Prohibited, Disabled, 3, Enabled, Disabled"
OLD = "0, Tesla V100-SXM2-32GB, 450.80.02, 32510, 0, Default, [N/A], [N/A], [N/A], Enabled"


def facts(**changed: object) -> Facts:
    standard = Facts("3.11.2", True, gpt2hpc=__version__, torch="2.9.0", cuda="12.8", gloo=True, nccl=True, gpus=1)
    return dataclasses.replace(standard, **changed)  # type: ignore[arg-type]


def cards(*lines: str) -> list[gpu.Card]:
    return gpu.parsed("\n".join(lines), (*gpu.BASIC, *gpu.MORE))


def states(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.name, finding.state) for finding in findings]


# Slurm ----------------------------------------------------------------------------------------------------------


def test_a_list_of_gpus_may_be_the_first_alone() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
    assert Scene({**job, "SLURM_JOB_GPUS": "0"}).gpus_allotted
    assert not Scene({**job, "SLURM_GPUS_ON_NODE": "0"}).gpus_allotted
    assert not Scene({"SLURM_GPUS_ON_NODE": "4"}).gpus_allotted, "the shell of salloc"


def test_what_a_preemption_costs() -> None:
    def cost(name: str, **scene: object) -> Finding:
        return asked.preemption(name, PARTITIONS, SETTINGS, Scene({}, **scene))  # type: ignore[arg-type]

    assert (cost("low").state, "GraceTime=30 s" in cost("low").text) == ("OK", True)
    assert cost("low0").state == "WARN"
    assert "KillWait=20 s" in cost("low0").text
    assert "--checkpoint.every_minutes" in cost("low0").text
    assert cost("high") == ok("preemption", "none in high")
    assert cost("apart").text == "none in apart", "nobody of a higher tier shares its nodes"
    assert "frozen" in cost("frozen").text


def test_a_grace_that_is_shorter_than_a_measured_save(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 5, "save_s": 25.0, "save_bytes": 3e9}\n{"step": 9, "save_s'
    )
    found = asked.preemption("low", PARTITIONS, SETTINGS, Scene({}, run=run))
    assert (found.state, "about 25 s (as this run has measured)" in found.text) == ("WARN", True)


def test_a_preemption_by_qos_is_not_judged_by_the_partition() -> None:
    """Where Slurm does not tell of QOS, as here, nothing is promised."""
    found = asked.preemption("low", PARTITIONS, {**SETTINGS, "PreemptType": "preempt/qos"}, Scene({"PATH": ""}))
    assert "QOS" in found.text
    assert "GraceTime=30" not in found.text


def test_an_image_in_one_file_where_slurm_signals_every_process(tmp_path: Path) -> None:
    def state(kind: str, image: Path | None) -> str:
        scene = Scene({}, image=None if image is None else str(image))
        return slurm._proctrack({"ProctrackType": f"proctrack/{kind}"}, scene).state

    (tmp_path / "gpt2hpc.sif").touch()
    assert state("linuxproc", tmp_path / "gpt2hpc.sif") == "OK", "the job unpacks it"
    assert state("linuxproc", tmp_path) == "OK", "unpacked"
    assert state("linuxproc", None) == "OK"
    assert state("cgroup", tmp_path / "gpt2hpc.sif") == "OK"


# GPUs -----------------------------------------------------------------------------------------------------------


def test_cards_by_what_nvidia_smi_tells() -> None:
    found = cards(HEALTHY, ILL, "No devices were found")
    assert [card["index"] for card in found] == ["0", "1"]
    assert gpu._state(cards(HEALTHY)) == []
    assert states(gpu._state(found)) == [
        ("GPU 1", "MISSING"),  # its compute mode
        ("GPU 1", "WARN"),  # MIG
        ("GPU 1", "WARN"),  # memory errors
        ("GPU 1", "WARN"),  # ECC
        ("GPU 1", "WARN"),  # in use
        ("persistence mode", "OK"),
    ]
    assert gpu._state(cards(OLD)) == [], "what a card does not have is nothing to warn of"


@pytest.mark.parametrize(
    ("driver", "changed", "state", "said"),
    [
        ("535.104.05", {}, "OK", "at least 525"),
        ("580.65.06", {"cuda": "13.0"}, "OK", "at least 580"),
        ("580.65.06", {"cuda": "11.8"}, "OK", "at least 450"),
        ("535.104.05", {"cuda": "13.0", "gpus": 0}, "MISSING", "install a torch for CUDA 12"),
        ("470.57.02", {"cuda": "12.8", "gpus": 0}, "MISSING", "install a torch for CUDA 11"),
        ("390.30", {"cuda": "12.8", "gpus": 0}, "MISSING", "install a newer driver"),
        ("535.104.05", {"cuda": "13.0"}, "WARN", "torch sees the GPUs"),
        (
            "535.104.05",
            {"cuda": None, "gpus": 0},
            "MISSING",
            "CPU build on a machine with GPUs; install one for CUDA 12",
        ),
        ("535.104.05", {"gpus": 0}, "MISSING", "CUDA_VISIBLE_DEVICES"),
        ("535.104.05", {"hip": "6.2", "cuda": None}, "MISSING", "ROCm"),
    ],
)
def test_torch_against_the_driver(driver: str, changed: dict[str, object], state: str, said: str) -> None:
    found = gpu._driver(cards(HEALTHY.replace("535.104.05", driver)), facts(**changed))
    assert (found[0].state, said in found[0].text) == (state, True), found


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"], False),
        ((12, 1), ["sm_90", "compute_90"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_code_for_a_card(capability: tuple[int, int], architectures: list[str], expected: bool) -> None:
    assert gpu.runs(capability, architectures) is expected
    found = gpu._built_for(facts(capabilities=[list(capability)], architectures=architectures))
    assert bool(found) is not expected


def test_a_gpu_is_due_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu._none(Scene({}, wants_gpu=True), facts()).state == "OK", "torch sees it"
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a GPU")
    nothing = facts(gpus=0, cuda=None)
    assert gpu._none(Scene({}), nothing).state == "OK"
    assert gpu._none(Scene({}, wants_gpu=True), nothing).state == "MISSING"
    assert gpu._none(Scene({**JOB, "SLURM_GPUS_ON_NODE": "4"}), None).state == "MISSING"
    assert gpu._none(Scene({**JOB, "SLURM_GPUS_ON_NODE": "0"}), None).state == "OK"
    salloc = {"SLURM_JOB_ID": "1", "SLURM_JOB_GPUS": "0,1"}
    assert gpu._none(Scene(salloc), None).state == "OK", "the shell of salloc on a login node"


# The Python that trains -----------------------------------------------------------------------------------------


def test_this_python_is_asked_in_a_process_of_its_own() -> None:
    found = interpreter.probe(Scene({}))
    assert found.facts is not None, found.failure
    assert found.facts.gpt2hpc == __version__
    assert (found.facts.torch is None) is (importlib.util.find_spec("torch") is None)


def test_a_python_that_is_no_python() -> None:
    scene = Scene({}, site=Site(python="/bin/false"))
    found = interpreter.look(scene, interpreter.probe(scene))
    assert states(found) == [("python of ranks", "MISSING")]


def test_what_a_python_lacks() -> None:
    def look(scene: Scene, **changed: object) -> list[str]:
        return [finding.state for finding in interpreter.look(scene, Probe(facts(**changed)))]

    there = Scene({}, image="/there.sif")
    assert look(there) == ["OK", "OK"]
    assert look(there, gpt2hpc="0.0.9") == ["MISSING", "OK"], "another version than the host's"
    assert look(there, gpt2hpc=None, gpt2hpc_error="ModuleNotFoundError") == ["MISSING", "OK"]
    assert look(there, torch=None, torch_error="ModuleNotFoundError: No module named 'torch'") == ["OK", "MISSING"]
    assert look(there, gloo=False) == ["OK", "MISSING"]
    assert interpreter.look(Scene({}, image="/nowhere"), Probe(None, "no such image"))[0].state == "WARN"


def test_how_python_is_run_in_a_job(tmp_path: Path) -> None:
    site = Site(runtime="singularity", binds=(str(tmp_path), "/nowhere/at/all:/data"))
    words = interpreter.command(Scene({}, site=site, image="/i.sif"), nv=True)
    assert words == ["singularity", "--quiet", "exec", "--nv", "--bind", str(tmp_path), "/i.sif", "python3"]
    assert interpreter.command(Scene({}), nv=True) == [sys.executable]
    assert interpreter.command(Scene({}, site=Site(python="/p")), nv=False) == ["/p"]


def test_packages_against_their_ranges() -> None:
    wanted = ["pytest>=1", "pytest<1", "no-such-thing>=2", "tiktoken>=99; extra == 'train'"]
    assert len(list(python.unmet(wanted))) == 2
    assert [line.split()[0] for line in python.unmet(wanted, extra="train")] == ["pytest", "no-such-thing", "tiktoken"]


def test_packages_that_leak_in() -> None:
    env = {
        "PYTHONPATH": "/elsewhere",
        "CONDA_PREFIX": "/opt/conda",
        "LD_LIBRARY_PATH": "/usr/lib:/apps/cuda/11.2/lib64",
    }
    assert [finding.name for finding in python._leaks(Scene(env))][-2:] == ["conda", "LD_LIBRARY_PATH"]
    assert "PYTHONPATH" in [finding.name for finding in python._leaks(Scene(env))]
    assert python._leaks(Scene({"CONDA_PREFIX": sys.prefix})) == python._leaks(Scene({}))


def test_an_image_that_is_not_there() -> None:
    found = container.look(Scene({}, image="/nowhere.sif"))
    assert ("image", "MISSING") in states(found)
    assert states(container.look(Scene({"APPTAINER_CONTAINER": "/i.sif"}))) == [("image", "OK")]


def test_an_image_that_pyxis_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apptainer, FUSE and user namespaces are no matter to it, and a registry's name is no path. Here, no srun is on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    image = tmp_path / "gpt2hpc.sqsh"
    image.touch()
    site = Site(runtime="pyxis", binds=("/nowhere/at/all",))
    found = container.look(Scene({}, site=site, image=str(image)))
    assert states(found) == [("pyxis", "MISSING"), ("image", "OK"), ("binds", "MISSING")]
    assert (container._pyxis(True).state, container._pyxis(False).state) == ("OK", "MISSING")
    lacking = container.look(Scene({}, site=site, image="/nowhere.sqsh"))[1]
    assert (lacking.state, "(enroot import)" in lacking.text) == ("MISSING", True)
    fetched = Scene({}, site=Site(runtime="pyxis"), image="nvcr.io#nvidia/pytorch:26.01-py3")
    assert states(container.look(fetched)) == [("pyxis", "MISSING"), ("image", "WARN")]
    assert slurm._proctrack({"ProctrackType": "proctrack/linuxproc"}, fetched).state == "OK"
    (said,) = interpreter.look(fetched, interpreter.probe(fetched))
    assert (said.name, said.state) == ("python of ranks", "WARN")
    assert "srun -N1 --container-image=nvcr.io#nvidia/pytorch:26.01-py3 python3 -m gpt2hpc doctor" in said.text


@pytest.mark.parametrize(
    ("runtime", "image", "expected"),
    [
        ("pyxis", "nvcr.io#nvidia/pytorch:26.01-py3", "nvcr.io#nvidia/pytorch:26.01-py3"),
        ("pyxis", "docker://ubuntu", "docker://ubuntu"),
        ("pyxis", "gpt2hpc.sqsh", str(Path("gpt2hpc.sqsh").absolute())),
        ("apptainer", "docker://ubuntu", str(Path("docker:/ubuntu").absolute())),
        ("none", "gpt2hpc.sif", None),
    ],
)
def test_images_as_submit_names_them(runtime: str, image: str, expected: str | None) -> None:
    assert doctor._image(Site(runtime=runtime, image=image), None) == expected  # type: ignore[arg-type]
    assert doctor._image(Site(runtime=runtime, image=image), "none") is None  # type: ignore[arg-type]


# Network and disks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("hsn", True),
        ("=hsn0", True),
        ("=hsn", False),
        ("ib", False),
        ("ib,eth", True),
        ("^eth", True),
        ("^eth,hsn,lo", False),
    ],
)
def test_interfaces_as_nccl_reads_them(wish: str, expected: bool) -> None:
    assert network.matches(wish, ["eth0", "hsn0", "lo"]) is expected


def test_an_interface_that_is_not_there_is_missing_where_it_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(env: dict[str, str]) -> list[tuple[str, str]]:
        return states(network._named(["eth0"], Scene(env, site=Site(environment={"NCCL_SOCKET_IFNAME": "nosuch"}))))

    assert look({**JOB}) == [("NCCL_SOCKET_IFNAME", "MISSING")]
    assert look({**JOB, "GLOO_SOCKET_IFNAME": "l"})[1] == ("GLOO_SOCKET_IFNAME", "MISSING")
    assert look({**JOB, "GLOO_SOCKET_IFNAME": "lo"})[1] == ("GLOO_SOCKET_IFNAME", "OK")
    monkeypatch.setattr(Scene, "has_slurm", True)
    assert look({}) == [("NCCL_SOCKET_IFNAME", "WARN")], "a login node has other interfaces"


def test_infiniband_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in (("state", "4: ACTIVE\n"), ("rate", "200 Gb/sec (4X HDR)\n"), ("link_layer", "InfiniBand\n")):
        (port / name).write_text(text)
    assert network.devices(tmp_path) == {"mlx5_0": "ACTIVE, 200 Gb/sec (4X HDR), InfiniBand"}
    monkeypatch.setattr(network, "devices", lambda: {"mlx5_0": "ACTIVE"})
    assert network._infiniband(Scene({}), Probe(facts()))[0].state == "OK"
    assert network._infiniband(Scene({}), Probe(facts(libibverbs=False)))[0].state == "MISSING"
    assert network._infiniband(Scene({"NCCL_IB_DISABLE": "1"}), Probe(facts()))[0].state == "WARN"
    monkeypatch.setattr(network, "devices", lambda: {"mlx5_0": "DOWN"})
    assert network._infiniband(Scene({}), Probe(facts()))[0].state == "WARN"


MOUNTS = r"""
22 28 0:20 / /proc rw,nosuid - proc proc rw
28 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 28 0:26 / /tmp rw,nosuid,noexec - tmpfs tmpfs rw
31 28 0:50 / /scratch\040big rw - lustre 10.0.0.1@o2ib:/fs rw,flock
"""


@pytest.mark.parametrize(
    ("path", "kind", "where"),
    [("/scratch big/me", "lustre", "/scratch big"), ("/tmp", "tmpfs", "/tmp"), ("/tmpx", "ext4", "/")],
)
def test_the_file_system_of_a_path(path: str, kind: str, where: str) -> None:
    found = file_system.mount_of(Path(path), MOUNTS)
    assert found is not None
    assert (found.where, found.kind, found.is_local) == (where, kind, kind != "lustre")
    assert file_system.mount_of(Path("/tmp"), "") is None


def test_what_a_quota_leaves() -> None:
    said = "Disk quotas for user me (uid 1000): \n     Filesystem   space   quota   limit   grace\n /home 900 1000 1100 0 5 0 0 0\n"
    assert disk.blocks_left(said, "/home") == 100 * 1024
    assert disk.blocks_left(said, "/scratch") is None
    lustre = "     /lustre 1200* 1000 1100 6d 5 0 0 -\n"
    assert disk.blocks_left(lustre, None) == -200 * 1024
    assert disk.blocks_left("/home 900 0 0 0 5 0 0 0\n", "/home") is None, "no limit"
    assert disk.blocks_left("nothing of the kind", None) is None


def test_files_larger_than_the_shell_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {resource.RLIMIT_FSIZE: (10**9, 10**9), resource.RLIMIT_CPU: (3600, 3600)}
    monkeypatch.setattr(resource, "getrlimit", sizes.__getitem__)
    assert states(limits._sizes(Scene({}))) == [("file size", "MISSING"), ("CPU time", "WARN")]


def test_data_with_a_shard_that_is_gone(data: Path) -> None:
    scene = Scene({}, config=tiny.config(data), data=str(data))
    assert [finding.state for finding in tokens.look(scene)] == ["OK", "OK"]
    next(data.glob("*train*.npy")).unlink()
    found = tokens.look(scene)
    assert (found[1].state, "is missing; run `gpt2hpc prepare` again" in found[1].text) == ("MISSING", True)
    assert tokens.look(Scene({}, data="/nowhere"))[1].state == "MISSING"


def test_data_that_a_start_refuses(data: Path) -> None:
    config = tiny.config(data)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, block_size=1024))
    (found,) = tokens._data(Scene({}, config=wide, data=str(data)))
    assert (found.state, "too few for one window of model.block_size=1024" in found.text) == ("MISSING", True)
    few = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=10, padded_vocab_size=10))
    (found,) = tokens._data(Scene({}, config=few, data=str(data)))
    assert (found.state, "model.vocab_size=10 is below the 256 tokens" in found.text) == ("MISSING", True)
    shard = next(data.glob("*train*.npy"))
    shard.write_bytes(shard.read_bytes()[:-2])
    (found,) = tokens._data(Scene({}, config=config, data=str(data)))
    assert (found.state, f"{shard} has " in found.text) == ("MISSING", True)


# Disks: the run's checkpoints, and shards on the node ---------------------------------------------------------------


def test_the_checkpoint_that_a_run_goes_on_from_needs_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three, one being written and that one, which is there, four are to come."""
    run, config = RunDir(tmp_path / "run"), Config(checkpoint=CheckpointConfig(keep_last=3))
    scene = Scene({}, run=run, config=config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(3.5 * config.state_bytes)))
    there = run.checkpoints / checkpoint.name(started="20260131-120000", tag="x", step=10)
    there.mkdir(parents=True)
    with (there / "state").open("wb") as file:
        file.truncate(config.state_bytes)
    found = disk._run_dir(scene, tmp_path)
    assert ("space", "MISSING") in states(found)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(4.5 * config.state_bytes)))
    told = next(finding for finding in disk._run_dir(scene, tmp_path) if finding.name == "space")
    assert (told.state, "5 checkpoints of" in told.text) == ("OK", True)


def test_where_shards_are_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    def found(env: dict[str, str], **data: Any) -> list[tuple[str, str]]:
        return states(disk._shard_cache(Scene(env, config=Config(data=DataConfig(stage=True, **data)))))

    assert disk._shard_cache(Scene({})) == []
    assert found({}, cache_dir=str(tmp_path / "a" / "b"), cache_gib=1e-6) == [("shard cache", "OK")]
    assert found({"X": str(tmp_path)}, cache_dir="$X/a", cache_gib=1e-6) == [("shard cache", "OK")]
    assert found({}, cache_dir="$X/a") == [("shard cache", "MISSING")]
    assert found({}, cache_dir=str(tmp_path), cache_gib=1e9) == [("shard cache", "WARN")]
    (tmp_path / "file").touch()
    assert found({}, cache_dir=str(tmp_path / "file" / "a")) == [("shard cache", "MISSING")]
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found({}, cache_dir="$X/a") == [("shard cache", "WARN")], "a login node"


# All together ---------------------------------------------------------------------------------------------------


def test_a_check_that_breaks_or_hangs_is_a_warning_and_the_others_are_made() -> None:
    never = threading.Event()

    def breaks(scene: Scene) -> list[Finding]:
        raise KeyError("no such thing")

    def hangs(scene: Scene) -> list[Finding]:
        never.wait()
        return []

    groups = [Group("A", breaks), Group("B", hangs, patience_s=0.5), Group("C", lambda scene: [ok("c", "is well")])]
    found = [findings for _, findings in rounds.made(groups, Scene({}))]
    never.set()
    assert [[finding.state for finding in findings] for findings in found] == [["WARN"], ["WARN"], ["OK"]]
    assert "KeyError" in found[0][0].text
    assert "0.5 s" in found[1][0].text


def test_a_disk_that_hangs_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Opening a pipe that nobody writes to waits as opening a file on a dead server's disk does."""
    for name in ("config.yaml", "metrics.jsonl"):
        os.mkfifo(tmp_path / name)
        request.addfinalizer(lambda path=tmp_path / name: os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK)))
    monkeypatch.setattr(programs, "PATIENCE_S", 0.5)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("GPT2HPC_SITE", raising=False)
    scene, found = doctor._scene(doctor.new_parser().parse_args(["--run-dir", str(tmp_path)]))
    assert states(found) == [("settings", "WARN")]
    assert f"{tmp_path} does not answer in 0.5 s" in found[0].text
    assert scene.data is None
    assert "for 1.5 GB of" in scene.save_words, "not known from the run"


def test_settings_that_cannot_be_read_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("train: {no_such_setting: 1}\n")
    (tmp_path / "site.yaml").write_text("patrition: gpu\n")
    flags = ["--run-dir", str(tmp_path), "--site", str(tmp_path / "site.yaml")]
    _, found = doctor._scene(doctor.new_parser().parse_args(flags))
    assert states(found) == [("settings", "MISSING"), ("site profile", "MISSING")]


def test_of_what_slurm_says_as_it_gives_up_the_cause_is_told() -> None:
    said = (
        "scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "scontrol: error: fetch_config: DNS SRV lookup failed\n"
        "scontrol: error: _establish_config_source: failed to fetch config\n"
        "scontrol: fatal: Could not establish a configuration source\n"
    )
    assert inventory.last_cause(said) == "Could not establish a configuration source"
    assert inventory.last_cause("scontrol does not answer in 30 s") == "scontrol does not answer in 30 s"


def test_a_program_that_does_not_end_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    answer = ask(("sh", "-c", f"(sleep 60; touch {tmp_path}/late) & sleep 60"), patience_s=0.5)
    assert answer is not None
    assert (answer.code, answer.words) == (None, "no answer in 0.5 s")
    assert time.monotonic() - began < 30
    assert ask(("no-such-program",)) is None


def test_json_of_findings() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(ok("a", "b")))) == {"name": "a", "state": "OK", "text": "b"}
