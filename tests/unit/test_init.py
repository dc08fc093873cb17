"""Site profiles guessed from what clusters of several kinds tell; on a real Slurm, see tests/cluster/test_init.py."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2hpc.cluster import inventory, site_guess, site_profile
from gpt2hpc.cluster.inventory import Association, Partition
from gpt2hpc.cluster.site_facts import Facts
from gpt2hpc.cluster.site_guess import Guess
from gpt2hpc.cluster.site_profile import Site
from tests.tiny import gpt2hpc

CPU = Partition("batch", True, "1-00:00:00", 100, 128, 0, "", "amd")
GPU = Partition("gpu", False, "2-00:00:00", 20, 64, 4, "gpu:a100:4(S:0-1)", "a100,amd")
PLAIN = Facts(
    settings={"SelectType": "select/cons_tres", "ClusterName": "kit"},
    partitions=[CPU, GPU],
    associations=[
        Association("proj1", "", ("long", "normal"), "normal"),
        Association("proj2", "", ("normal",), ""),
    ],
    default_account="proj1",
    programs=["apptainer"],
    interfaces=["lo", "eth0", "ib0", "ib1"],
    suffix="i",
    disks=["$SCRATCH"],
)


def keyed(facts: Facts) -> dict[str, Guess]:
    return {guess.key: guess for guess in site_guess.guesses(facts)}


def profile(facts: Facts, tmp_path: Path) -> Site:
    return site_profile.read(site_guess.text(site_guess.guesses(facts), "of a test"), tmp_path / "site.yaml")


def test_the_profile_of_a_cluster_with_gpus_and_infiniband(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert profile(PLAIN, tmp_path) == Site(
        partition="gpu",
        account="proj1",
        gpus_per_node=4,
        gpu_directive="gpus-per-node",
        cpus_per_task=16,
        time="24:00:00",
        runtime="apptainer",
        binds=("/scratch/me",),
        environment={"NCCL_SOCKET_IFNAME": "ib"},
        master_addr_suffix="i",
        path=tmp_path / "site.yaml",
        given=frozenset(
            [
                "partition",
                "account",
                "gpus_per_node",
                "gpu_directive",
                "cpus_per_task",
                "time",
                "runtime",
                "binds",
                "environment",
                "master_addr_suffix",
            ]
        ),
    )


def test_each_guess_is_explained_and_each_example_can_be_taken(tmp_path: Path) -> None:
    slingshot = dataclasses.replace(PLAIN, interfaces=["hsn0", "hsn1"], settings={"DefMemPerCPU": "2000"})
    for facts in (PLAIN, slingshot, Facts({}, [CPU])):
        found = site_guess.guesses(facts)
        assert len({guess.key for guess in found}) == len(found)
        assert all(guess.why.endswith(".") and len(guess.why) > 20 for guess in found)
        text = site_guess.text([dataclasses.replace(guess, sure=True) for guess in found], "x")
        site_profile.read(text, tmp_path / "site.yaml")
        assert max(map(len, text.splitlines())) <= 120


def kinds(*rows: Partition) -> Facts:
    return dataclasses.replace(PLAIN, partitions=rows)


@pytest.mark.parametrize(
    ("facts", "key", "line", "why"),
    [
        (
            PLAIN,
            "partition",
            "partition: gpu",
            "The partition with most GPUs, with 80 GPUs on 20 nodes. The others: batch.",
        ),
        (kinds(CPU), "partition", "partition: batch", "The default partition, with no GPUs"),
        (
            kinds(dataclasses.replace(GPU, name="small", is_default=True, nodes=1), GPU),
            "partition",
            "partition: small",
            "The default partition, with 4 GPUs on 1 node.",
        ),
        (kinds(CPU), "gpus_per_node", "# gpus_per_node: 4", "no GPUs"),
        (
            kinds(GPU, dataclasses.replace(GPU, nodes=2, gpus=8, gres="gpu:h100:8", features="h100")),
            "gpus_per_node",
            "gpus_per_node: 4",
            "What most of its nodes have (there are nodes with 4, 8)",
        ),
        (
            kinds(GPU, dataclasses.replace(GPU, nodes=2, features="h100")),
            "constraint",
            "# constraint: a100",
            "not all alike; they have the features a100, amd, h100",
        ),
        (
            dataclasses.replace(PLAIN, settings={"SelectType": "select/linear"}),
            "gpu_directive",
            "gpu_directive: gres",
            "SelectType=select/linear does not know",
        ),
        (
            dataclasses.replace(PLAIN, settings={"SelectType": "select/cons_res"}),
            "gpu_directive",
            "gpu_directive: gres",
            "SelectType=select/cons_res does not know",
        ),
        (
            kinds(dataclasses.replace(GPU, cpus=2)),
            "cpus_per_task",
            "# cpus_per_task: 1",
            "2 CPUs, fewer than its 4 GPUs",
        ),
        (kinds(dataclasses.replace(GPU, time_limit="4:00:00")), "time", "time: 4:00:00", "gpu allows 4:00:00"),
        (kinds(dataclasses.replace(GPU, time_limit="infinite")), "time", "# time: 24:00:00", "gpu has no limit"),
        (
            kinds(dataclasses.replace(GPU, time_limit="infinite", default_time="30:00")),
            "time",
            "time: 24:00:00",
            "gpu has no limit. A job that names no time gets 30:00.",
        ),
        (PLAIN, "account", "account: proj1", "You may submit under proj1, proj2; this is your default"),
        (PLAIN, "qos", "# qos: long", "You may ask for long, normal; normal is taken by itself"),
        (dataclasses.replace(PLAIN, associations=None), "account", "# account: proj42", "Slurm keeps no accounts"),
        (
            dataclasses.replace(PLAIN, settings={"DefMemPerCPU": "2000"}),
            "sbatch",
            "# sbatch: {mem: 0}",
            "DefMemPerCPU=2000 MB",
        ),
        (dataclasses.replace(PLAIN, pyxis=True), "runtime", "runtime: apptainer", "on PATH here (srun has pyxis, too)"),
        (dataclasses.replace(PLAIN, programs=[], pyxis=True), "runtime", "runtime: pyxis", "--container-image"),
        (
            dataclasses.replace(PLAIN, programs=[], modules=["singularity/3.8", "Apptainer-Tools/2"]),
            "setup",
            "setup: [module load Apptainer-Tools/2]",
            "known to a job",
        ),
        (dataclasses.replace(PLAIN, programs=[]), "runtime", "# runtime: apptainer", "there is no `module`"),
        (
            dataclasses.replace(PLAIN, interfaces=["hsn0", "ib0"]),
            "environment",
            "environment: {NCCL_SOCKET_IFNAME: hsn}",
            "This machine has hsn0 (Slingshot)",
        ),
        (
            dataclasses.replace(PLAIN, interfaces=["lo", "eth0"]),
            "environment",
            "# environment: {NCCL_SOCKET_IFNAME: ib}",
            "interfaces: eth0.",
        ),
        (
            dataclasses.replace(PLAIN, suffix="-ib0"),
            "master_addr_suffix",
            'master_addr_suffix: "-ib0"',
            "another that resolves",
        ),
    ],
)
def test_a_guess_and_its_reason(facts: Facts, key: str, line: str, why: str) -> None:
    guess = keyed(facts)[key]
    assert guess.line == line
    assert why in guess.why


def test_what_sacctmgr_prints_is_read() -> None:
    said = "proj1||long,normal|normal\nproj2|gpu||\nnot a row\n"
    assert inventory.associations_in(said) == [
        Association("proj1", "", ("long", "normal"), "normal"),
        Association("proj2", "gpu", (), ""),
    ]


def test_interfaces_are_those_of_this_machine() -> None:
    """In a network of its own, where the one interface has another name."""
    prefix = ["unshare", "-n", "sh", "-c", 'ip link set lo name ib7 && exec "$0" "$@"']
    if not shutil.which("ip") or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network namespace needs root and iproute2")
    program = "from gpt2hpc.cluster import site_facts; print(site_facts._interfaces())"
    done = subprocess.run([*prefix, sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['ib7']\n"


def test_without_slurm_there_is_nothing_to_ask(tmp_path: Path) -> None:
    done = gpt2hpc("init", env={"PATH": "/nowhere", "HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (8, "")
    assert (
        "sinfo is not on PATH, so there is no cluster to ask; run it on a login node, or begin with an example"
        in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_slurm_that_does_not_answer_is_named(tmp_path: Path) -> None:
    if not shutil.which("sinfo"):
        pytest.skip("Slurm's programs are not installed")
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "gone.conf"), "HOME": str(tmp_path)}
    done = gpt2hpc("init", "--dry-run", env=environment)
    assert done.returncode == 8
    assert "Slurm does not answer" in done.stderr


def test_a_profile_that_is_there_is_kept(tmp_path: Path) -> None:
    own = tmp_path / "site.yaml"
    own.write_text("partition: mine\n")
    done = gpt2hpc("init", "--out", own, env={"PATH": "/nowhere"})
    assert done.returncode == 2
    assert f"{own} is there already" in done.stderr
    assert own.read_text() == "partition: mine\n"
