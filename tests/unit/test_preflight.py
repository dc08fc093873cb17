"""What is made of what the ranks see: whose fault it is, and how the user is told."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt2hpc import __version__
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.file_system import Mount
from gpt2hpc.cluster.submitter import other_version
from gpt2hpc.config import CheckpointConfig, Config, TrainConfig
from gpt2hpc.errors import ConfigError, DataError, MissingError, RunDirError
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint, rank_facts
from gpt2hpc.training.bandwidth import meetings, pair_gb_s, standing_out
from gpt2hpc.training.preflight import Preflight, too_slow
from gpt2hpc.training.process_group import Ranks, joined
from gpt2hpc.training.rank_facts import Fault, Gpu, RankFacts, faults, remarks
from tests import tiny

GIB = 1 << 30
H100 = Gpu("NVIDIA H100 80GB HBM3", "", 80 * GIB, 79 * GIB)


def ranks(nodes: int, **changed: dict[str, Any]) -> list[RankFacts]:
    """Two on each of n0, n1, …, each with a GPU; with other facts on some nodes, as `n1={"torch": "2.5"}`."""
    found = []
    for rank in range(2 * nodes):
        node = f"n{rank // 2}"
        facts = RankFacts(rank, node, "0.1.0", "2.13.0", 8, 1e9, dataclasses.replace(H100, uuid=f"GPU-{rank}"), "abc")
        found.append(dataclasses.replace(facts, **changed.get(node, {})))
    return found


def only(facts: list[RankFacts]) -> Fault:
    (fault,) = faults(facts)
    return fault


def test_equal_nodes_are_fit() -> None:
    assert list(faults(ranks(3))) == []
    assert list(remarks(ranks(3))) == []


@pytest.mark.parametrize("name", ["version", "torch"])
def test_other_versions_are_the_users(name: str) -> None:
    fault = only(ranks(2, n1={name: "9.9"}))
    assert (fault.nodes, fault.kind) == ((), MissingError)
    assert "9.9 on n1; install one version" in fault.text


def test_another_version_than_the_submitters() -> None:
    assert other_version({}) is None
    assert other_version({"GPT2HPC_SUBMITTED_VERSION": __version__}) is None
    of_python = other_version({"GPT2HPC_SUBMITTED_VERSION": "9.9"})
    assert of_python == (
        f"gpt2hpc 9.9 submitted the job, but its ranks run gpt2hpc {__version__}; install 9.9 for the job's Python, "
        f"or submit with {__version__}"
    )
    of_image = other_version({"GPT2HPC_SUBMITTED_VERSION": "9.9", "APPTAINER_CONTAINER": "/x.sif"})
    assert of_image is not None
    assert "; build the image anew with 9.9, or" in of_image


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": "NVIDIA A100"}, "A100 of 80 GiB on n1"),
        ({"total_bytes": 40 * GIB, "free_bytes": 40 * GIB}, "H100 80GB HBM3 of 40 GiB on n1"),
    ],
)
def test_other_gpus_are_remarked_on(changed: dict[str, Any], told: str) -> None:
    facts = ranks(3)
    for rank in (2, 3):
        gpu = facts[rank].gpu
        assert gpu
        facts[rank] = dataclasses.replace(facts[rank], gpu=dataclasses.replace(gpu, **changed))
    assert list(faults(facts)) == []
    (remark,) = remarks(facts)
    assert f"H100 80GB HBM3 of 80 GiB on n0 and n2, {told}; the slowest" in remark


def test_as_many_gpus_as_slurm_found_on_each_node() -> None:
    """An allocation of 4, 4 and 2 GPUs is no node's fault."""
    facts = [dataclasses.replace(ranks(5)[rank], node=f"n{rank // 4}") for rank in range(10)]
    assert (list(faults(facts)), list(remarks(facts))) == ([], [])


def test_a_gpu_that_somebody_uses() -> None:
    busy = dataclasses.replace(H100, uuid="GPU-9", free_bytes=12 * GIB)
    fault = only([*ranks(2)[:3], dataclasses.replace(ranks(2)[3], gpu=busy)])
    assert fault.nodes == ("n1",)
    assert "the GPU of rank 3 on n1 has 12.0 of 80.0 GiB free: another process holds 68.0; " in fault.text
    assert fault.text.endswith("set --train.preflight thin where GPUs are shared on purpose")


def test_two_ranks_on_one_gpu() -> None:
    one = [dataclasses.replace(each, gpu=H100) for each in ranks(1)]
    assert "ranks 0 and 1 have one GPU on n0" in only(one).text


def test_gpus_whose_identity_is_not_told_are_none_of_each_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a torch of before 2.5."""

    def seen(**told: str) -> list[RankFacts]:
        properties = SimpleNamespace(name="NVIDIA H100", **told)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GIB, 80 * GIB))
        envs = [DistEnv(rank, rank, 2, 2, "7", 0, "n0", node="n0") for rank in (0, 1)]
        return [rank_facts.seen(Ranks(env, torch.device("cuda", 0)), Path(), None) for env in envs]

    assert [each.gpu.kind for each in seen() if each.gpu] == ["H100 of 80 GiB"] * 2
    assert list(faults(seen())) == []
    assert "ranks 0 and 1 have one GPU on n0" in only(seen(uuid="GPU-1")).text


def test_a_node_without_the_data_is_to_blame_and_several_are_not() -> None:
    fault = only(ranks(3, n2={"data": "nothing (No such file or directory)"}))
    assert fault.nodes == ("n2",)
    assert fault.text == "data.dir is not for all nodes what it is for n0: n2 sees nothing (No such file or directory)"
    everywhere = only(ranks(3, n1={"data": "x"}, n2={"data": "x"}))
    assert (everywhere.nodes, everywhere.kind) == ((), DataError)
    assert only(ranks(2, n1={"data": "x"})).nodes == ("n1",), "of two nodes the other may be the bad one"


def test_data_on_each_nodes_own_disk_is_the_users() -> None:
    scratch, shared = Mount("/", "ext4"), Mount("/data", "nfs4")
    lacking = {"data": "nothing (No such file or directory)"}
    own = ranks(2, n0={"data_mount": scratch}, n1={"data_mount": scratch, **lacking})
    assert (only(own).nodes, only(own).kind) == ((), DataError)
    unmounted = ranks(2, n0={"data_mount": shared}, n1={"data_mount": scratch, **lacking})
    assert only(unmounted).nodes == ("n1",)
    emptied = ranks(2, n0={"data_mount": shared}, n1={"data_mount": shared, **lacking})
    assert only(emptied).nodes == ("n1",)


def test_a_gpu_that_does_not_work() -> None:
    fault = only([*ranks(2, n1={"gpu": None})[:2], dataclasses.replace(ranks(2)[2], gpu=None, trouble="CUDA error: x")])
    assert fault.nodes == ("n1",)
    assert fault.text == "the GPU of rank 2 on n1 does not work: CUDA error: x"


def test_threads_and_clocks_are_remarked_on() -> None:
    threads, clocks = remarks(ranks(2, n1={"threads": 4, "clock_s": 1e9 + 7}))
    assert "8 on n0, 4 on n1" in threads
    assert "n1 by +7.0 s" in clocks


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8])
def test_every_node_meets_every_other_once(nodes: int) -> None:
    names = [f"n{rank // 2}" for rank in range(2 * nodes)]
    inside, *rounds = meetings(names)
    assert inside == [(2 * node, 2 * node + 1) for node in range(nodes)]
    met = [tuple(sorted((names[a], names[b]))) for pairs in rounds for a, b in pairs]
    assert len(met) == len(set(met)) == nodes * (nodes - 1) // 2
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy)), "a rank meets two at once"


def test_each_round_is_a_sign_of_life() -> None:
    told: list[int] = []
    env = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, job="1", restart=0, nodes="n0")
    with joined(env, torch.device("cpu")) as alone:
        assert pair_gb_s(alone, ["n0"], lambda: told.append(1)) == {}
    assert len(told) == len(list(meetings(["n0"])))


def rates(nodes: int, **slow: float) -> dict[tuple[str, str], float]:
    """20 GB/s between any two, but `n1_n2=3` or, of a node, `n1=2`."""
    names = [f"n{node}" for node in range(nodes)]
    found = {(a, b): 20.0 for a in names for b in names if a < b}
    for name, rate in slow.items():
        for pair in found:
            if set(name.split("_")) <= set(pair):
                found[pair] = rate
    return found


def test_who_is_slow() -> None:
    assert standing_out(rates(4, n2=3.0)).nodes == ("n2",)
    assert standing_out(rates(4, n2=3.0)).pairs == ()
    assert standing_out(rates(4, n1_n3=3.0)).pairs == (("n1", "n3"),)
    assert standing_out(rates(4, n1_n3=3.0)).nodes == ()
    inside = {("n0", "n0"): 200.0, ("n1", "n1"): 9.0, ("n2", "n2"): 200.0}
    assert standing_out(rates(3) | inside).nodes == ("n1",)
    assert standing_out(rates(4)) == standing_out(rates(2, n0=1.0))


def test_who_is_suspected() -> None:
    fault = too_slow("all-reduce of 3 GB/s is below the floor", rates(4, n2=3.0), ["n0", "n1", "n2", "n3"])
    assert fault.nodes == ("n2",)
    assert "slow: n2; the slowest in GB/s: n0–n2 3, " in fault.text
    assert too_slow("", rates(4, n1_n3=3.0), ["n0", "n1", "n2", "n3"]).nodes == ("n1", "n3")
    assert too_slow("", rates(2), ["n0", "n1"]).nodes == ("n0", "n1")
    alike = too_slow("", rates(4), ["n0", "n1", "n2", "n3"])
    assert (alike.nodes, alike.kind) == ((), ConfigError)


@pytest.mark.parametrize(
    ("nodes", "device", "wish", "floor"),
    [
        (["n0", "n1"], "cuda", None, (20.0, "GPT2HPC_MIN_ALLREDUCE_GB_S=20")),
        (["n0", "n0"], "cuda", None, None),
        (["n0", "n1"], "cpu", None, None),
        (["n0", "n0"], "cpu", 5.0, (5.0, "train.min_allreduce_gb_s=5")),
    ],
)
def test_the_sites_floor_is_of_its_network(
    nodes: list[str], device: str, wish: float | None, floor: tuple[float, str] | None, tmp_path: Path
) -> None:
    config = Config(train=TrainConfig(min_allreduce_gb_s=wish))
    ranks = Ranks(DistEnv(0, 0, 2, 2, "7", 0, "n[0-1]"), torch.device(device))
    environ = {"GPT2HPC_MIN_ALLREDUCE_GB_S": "20"}
    manifest = tiny.make_data(tmp_path / "data", shard_tokens=(100,))
    assert Preflight(RunDir(tmp_path), config, manifest, ranks, nodes, environ).floor == floor


def test_space_for_the_checkpoint_that_is_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there; of the last three and the one being written, none is."""
    run, manifest = RunDir(tmp_path / "run"), tiny.make_data(tmp_path / "data", shard_tokens=(100,))
    config = Config(checkpoint=CheckpointConfig(keep_last=3))
    there = run.checkpoints / checkpoint.name(started="20260131-120000", tag="x", step=10)
    there.mkdir(parents=True)
    with (there / "state").open("wb") as file:
        file.truncate(config.state_bytes)
    ranks = Ranks(DistEnv(0, 0, 1, 1, "7", 0, "n0"), torch.device("cpu"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(3.5 * config.state_bytes)))
    with pytest.raises(RunDirError, match="one being written and the one resumed from"):
        Preflight(run, config, manifest, ranks, ["n0"], {})._check_space()
