"""`train.micro_batch_size: auto`: which size is chosen, and what a node leaves to a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2hpc import config_io
from gpt2hpc.cluster import host_memory
from gpt2hpc.config import Config, TrainConfig
from gpt2hpc.config_rules import check, grad_accum_steps
from gpt2hpc.errors import ConfigError
from gpt2hpc.training.meters import is_out_of_memory
from gpt2hpc.training.micro_batch import largest

SIZES = [1, 2, 4, 8, 16, 32, 64]


class Card:
    """A device of `limit_bytes` on which a step of some sequences takes what `needs` says; where that is too much it fails."""

    def __init__(self, limit_bytes: int, needs: Callable[[int], int], *, proves: bool = True) -> None:
        self.limit_bytes, self.proves = limit_bytes, proves
        self.needs, self.asked, self.tried = needs, 0, list[int]()

    def step(self, size: int) -> None:
        self.asked = size
        self.tried.append(size)

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        work()
        need = self.needs(self.asked)
        return need if need <= self.limit_bytes else None

    def largest(self, sizes: list[int] = SIZES, **more: int) -> int | None:
        return largest(sizes, self, self.step, **more)


@pytest.mark.parametrize("proves", [True, False])
@pytest.mark.parametrize(("limit", "expected"), [(109, None), (110, 1), (149, 4), (259, 8), (260, 16), (10**6, 64)])
def test_a_straight_line(limit: int, expected: int | None, proves: bool) -> None:
    card = Card(limit, lambda size: 100 + 10 * size, proves=proves)
    assert card.largest() == expected
    assert max(card.tried) <= (64 if proves else 4), "a CPU is not tried with what it may not have"


def test_what_does_not_fit_after_all_is_given_up() -> None:
    """A step that takes more than the line foretold is caught, and the next smaller one tried."""
    card = Card(200, lambda size: 100 + size + (200 if size > 16 else 0))
    assert card.largest() == 16
    assert card.tried == [1, 2, 4, 64, 32, 16]


def test_a_slope_that_noise_hides() -> None:
    """A CPU whose peak does not move with few sequences: then the formula's slope holds."""
    card = Card(300, lambda size: max(200, 100 + 10 * size), proves=False)
    assert card.largest() == 64, "which would be killed"
    assert card.largest(least_slope=10) == 8
    assert Card(205, lambda size: 200, proves=False).largest([1, 7, 49], least_slope=10) == 1, "not even measured"


def test_a_real_lack_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid"))


# Settings ---------------------------------------------------------------------------------------------------------


def test_auto_is_a_setting(tmp_path: Path) -> None:
    parser = config_io.new_parser("train", "")
    _, config = config_io.parse(parser, ["--preset", "smoke", "--train.micro_batch_size", "auto"])
    assert (config.train.micro_batch_size, config.train.rows) == ("auto", 1)
    config_io.store(config, tmp_path / "config.yaml")
    assert config_io.load(tmp_path / "config.yaml") == config
    for wrong in ("many", "0", "2.5"):
        with pytest.raises(ConfigError, match=rf"train\.micro_batch_size={wrong} (is not valid|must be above 0)"):
            config_io.parse(config_io.new_parser("train", ""), ["--train.micro_batch_size", wrong])


def test_auto_needs_a_step_that_ranks_can_share() -> None:
    config = Config(train=TrainConfig(micro_batch_size="auto"))
    check(config)
    assert grad_accum_steps(config, world_size=8) == 64
    with pytest.raises(ConfigError, match=r"not a multiple of .* = 1 × 1024 × 3 = 3072; try train\.tokens_per_step=52"):
        grad_accum_steps(config, world_size=3)


def test_a_run_may_go_on_with_another() -> None:
    config = Config()
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size="auto"))
    assert all(config_io.may_change(key) for key in config_io.differences(config, other))


# Memory of a node -------------------------------------------------------------------------------------------------


def machine(root: Path, *, available_kib: int, cgroup: str, **files: str) -> Path:
    """A /proc and a /sys as Linux writes them; `files` are named by their path below /sys/fs/cgroup, with __ for /."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       9999999 kB\nMemAvailable:   {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_OF_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_the_kernel_has(tmp_path: Path) -> None:
    assert host_memory.available_bytes(machine(tmp_path, available_kib=1000, cgroup="0::/\n")) == 1_024_000
    assert host_memory.available_bytes(tmp_path / "nowhere") is None
    assert 0 < host_memory.resident_bytes() <= host_memory.most_resident_bytes()


def test_cgroup_v2(tmp_path: Path) -> None:
    """A job's limit lies above the step's group, which has none of its own."""
    root = machine(
        tmp_path,
        available_kib=1000,
        cgroup="0::/slurm/job_1/step_0\n",
        slurm__job_1__memory_OF_max="500000\n",
        slurm__job_1__memory_OF_current="400000\n",
        slurm__job_1__memory_OF_stat="anon 100000\ninactive_file 50000\n",
        slurm__job_1__step_0__memory_OF_max="max\n",
        slurm__job_1__step_0__memory_OF_current="1000\n",
    )
    assert host_memory.available_bytes(root) == 500_000 - 400_000 + 50_000


def test_cgroup_v1(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        available_kib=1000,
        cgroup="5:cpu:/x\n4:memory:/slurm/job_1\n0::/\n",
        memory__slurm__job_1__memory_OF_limit_in_bytes="300000\n",
        memory__slurm__job_1__memory_OF_usage_in_bytes="200000\n",
        memory__slurm__job_1__memory_OF_stat="inactive_file 1\ntotal_inactive_file 7\n",
        memory__memory_OF_limit_in_bytes="9223372036854771712\n",
        memory__memory_OF_usage_in_bytes="200000\n",
    )
    assert host_memory.available_bytes(root) == 100_007


def test_in_a_container_only_its_own_group_is_seen(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        available_kib=1000,
        cgroup="0::/a/path/outside\n",
        memory_OF_max="500000\n",
        memory_OF_current="600000\n",
    )
    assert host_memory.available_bytes(root) == 0
