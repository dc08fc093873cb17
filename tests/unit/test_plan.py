"""`gpt2hpc plan`: arithmetic by hand, sizes of real files, a run's own numbers, and what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpt2hpc import config_io, plan
from gpt2hpc.cluster.ledger import Cause
from gpt2hpc.config import CheckpointConfig, Config, OptimizerConfig, TrainConfig
from gpt2hpc.data.manifest import Manifest
from gpt2hpc.errors import ConfigError, DataError, Gpt2hpcError, RunDirError, UsageError
from gpt2hpc.planning import measured, memory, storage
from gpt2hpc.planning.inputs import traffic_of
from gpt2hpc.planning.scaling import Fabric
from gpt2hpc.run_dir import RunDir
from gpt2hpc.training import checkpoint
from tests import tiny, written_runs
from tests.written_runs import attempt

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
PRESETS = {  # weights and biases of each published size, counted by hand: rows of padding, then 12·width² + 13·width a block
    "gpt2-124m": (50_304 + 1024) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768,
    "gpt2-350m": (50_304 + 1024) * 1024 + 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024,
    "gpt2-774m": (50_304 + 1024) * 1280 + 36 * (12 * 1280**2 + 13 * 1280) + 2 * 1280,
    "gpt2-1558m": (50_304 + 1024) * 1600 + 48 * (12 * 1600**2 + 13 * 1600) + 2 * 1600,
}


@pytest.fixture(autouse=True)
def _no_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No profile of whoever runs the tests."""
    monkeypatch.delenv("GPT2HPC_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert plan.main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(told(capsys, *arguments, "--json"))
    return found


def origins(found: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["origin"] for each in found["inputs"]["assumptions"]}


# Hours ------------------------------------------------------------------------------------------------------------


def test_hours_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """One GPU, no network: 2,097,152 tokens in 4 steps at 1,000 tokens/s are 2,097.152 s; the rest is added one by one."""
    found = facts(
        capsys,
        *("--train.total_tokens", "2097152", "--optimizer.warmup_tokens", "0", "--train.eval_tokens", "3000"),
        *("--train.eval_every", "2", "--gpus-per-node", "1", "--tokens-per-s-per-gpu", "1000", "--stall-s", "2"),
        *("--save-s", "10", "--start-s", "100", "--requeue-s", "20", "--mtbf-hours", "5", "--gpu", "a100"),
    )
    work_s = 2097.152 + 3 * 1.0  # validations before the first, after the second and after the last step, forward only
    expected_s = 5 * 3600 * math.exp(128 / 18_000) * math.expm1(902 / 18_000) * work_s / 900
    assert found["steps"] == 4
    assert found["work_s"] == pytest.approx(work_s)
    assert found["computing_s"] == pytest.approx(expected_s)
    assert found["wall_s"] == pytest.approx(expected_s + 100 + 10)
    assert found["gpu_hours"] == pytest.approx(found["wall_s"] / 3600)
    assert found["failures"] == pytest.approx(expected_s / 18_000)
    assert found["intervals"]["young_s"] == pytest.approx(math.sqrt(2 * 2 * 18_000))


def test_the_mfu_gives_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """124M: 6 × 124,439,808 + 12 × 12 × 768 × 1024 = 859,885,056 FLOPs a token; half of an A100's peak by that."""
    found = facts(capsys, "--preset", "gpt2-124m", "--gpu", "a100", "--gpus-per-node", "1", "--mfu", "0.5")
    assert found["step"]["compute_s"] == pytest.approx(524_288 * 859_885_056 / 156e12)
    assert found["mfu"] == pytest.approx(0.5)


def test_jobs_are_chained_by_the_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an hour, 300 s to start; and to stop 3 steps, a validation, 1.5 saves and a minute."""
    arguments = [
        *("--preset", "gpt2-124m", "--gpu", "a100", "--gpus-per-node", "8", "--tokens-per-s-per-gpu", "100000"),
        *("--start-s", "300", "--save-s", "20", "--stall-s", "0.1"),
    ]
    free, limited = facts(capsys, *arguments), facts(capsys, *arguments, "--time", "1:00:00")
    stop_s = 3 * 524_288 / 800_000 + limited["validation_s"] + 30 + 60
    assert limited["reserve_s"] == pytest.approx(stop_s)
    assert limited["jobs"] == math.ceil(free["computing_s"] / (3600 - 300 - stop_s)) == 5
    assert free["jobs"] == 1
    assert limited["wall_s"] - free["wall_s"] == pytest.approx(4 * 320)
    assert limited["gpu_hours"] == pytest.approx(8 * limited["wall_s"] / 3600)


def test_the_site_gives_time_and_gpus_and_a_flag_wins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("time: 2:00:00\ngpus_per_node: 4\n")
    found = facts(capsys, "--gpu", "a100", "--site", site)
    assert (found["inputs"]["time_limit_s"], found["step"]["gpus"]) == (7200, 4)
    assert (origins(found)["--time"], origins(found)["--gpus-per-node"]) == ("site", "site")
    monkeypatch.setenv("GPT2HPC_SITE", str(site))
    found = facts(capsys, "--gpu", "a100", "--time", "30:00", "--nodes", "2")
    assert (found["inputs"]["time_limit_s"], found["step"]["gpus"]) == (1800, 8)
    assert (origins(found)["--time"], origins(found)["--network-gbit-s"]) == ("flag", "default")


def test_failures_are_of_nodes_or_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "a100", "--nodes", "4", "--mtbf-hours", "1000"]
    assert facts(capsys, *arguments)["losses"]["mtbf_s"] == 250 * 3600
    assert facts(capsys, *arguments, "--mtbf-of", "job")["losses"]["mtbf_s"] == 1000 * 3600


def test_the_interval_that_loses_least_loses_less(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "--gpu", "a100", "--stall-s", "5", "--save-s", "30", "--mtbf-hours", "48")
    assert found["best"]["interval_s"] == pytest.approx(found["intervals"]["daly_s"])
    assert found["best"]["overhead"] < found["configured"]["overhead"]
    assert found["configured"]["interval_s"] == 900
    often = facts(capsys, "--gpu", "a100", "--checkpoint.every_steps", "10")
    assert often["configured"]["interval_s"] == pytest.approx(
        10 * (often["step"]["compute_s"] + often["step"]["exposed_s"])
    )
    slow = facts(capsys, "--gpu", "a100", "--stall-s", "0.01", "--save-s", "500", "--mtbf-hours", "48")
    assert slow["best"]["interval_s"] == 500


def test_saves_closer_together_than_one_takes_cost_hours(capsys: pytest.CaptureFixture[str]) -> None:
    """Each waits for the one before, so 953 saves of 65.6 s take 17 h, though the steps take 7."""
    arguments = ["--preset", "gpt2-1558m", "--gpu", "a100", "--gpus-per-node", "4", "--nodes", "8"]
    often = facts(capsys, *arguments, "--checkpoint.every_steps", "10")
    save_s, configured = often["inputs"]["save_s"], often["configured"]
    assert configured["interval_s"] + configured["waited_s"] == pytest.approx(save_s)
    assert often["wall_s"] > often["steps"] / 10 * save_s > 17 * 3600
    seldom = facts(capsys, *arguments)
    assert seldom["wall_s"] < 7 * 3600
    assert seldom["configured"]["waited_s"] == seldom["inputs"]["stall_s"]
    text = told(capsys, *arguments, "--checkpoint.every_steps", "10")
    assert "with a save every 0.42 min; EACH WAITS: a save takes 1.1 min (9)" in text
    assert "EACH WAITS" not in told(capsys, *arguments)


def test_the_interval_is_told_so_that_it_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "a100", "--gpus-per-node", "1", "--stall-s"]
    assert "--checkpoint.every_minutes 337 " in told(capsys, *arguments, "9")
    assert "--checkpoint.every_minutes 8.7 " in told(capsys, *arguments, "0.006")
    assert "e+" not in told(capsys, *arguments, "900")


def test_the_remark_tells_whence_the_rate_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, "--gpu", "a100")["row"]["remark"] == "as assumed"
    for flag in (("--mfu", "0.4"), ("--tokens-per-s-per-gpu", "9000")):
        assert facts(capsys, "--gpu", "a100", *flag)["row"]["remark"] == "as given"


# Scaling ----------------------------------------------------------------------------------------------------------


def test_a_table_over_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "--preset", "gpt2-124m", "--gpu", "a100", "--nodes", "1,2,3,4,8,64")
    rows = found["rows"]
    assert [row["nodes"] for row in rows] == [1, 2, 3, 4, 8, 64]
    efficiency = [row["efficiency"] for row in rows if row["step"]]
    assert efficiency[0] == pytest.approx(1, abs=1e-6)
    assert efficiency == sorted(efficiency, reverse=True)
    assert rows[0]["remark"] == "as assumed"
    assert rows[1]["remark"] == "modelled"
    assert rows[2]["step"] is None
    assert "not a multiple of 1024 × 24 GPUs; try --train.tokens_per_step 516096" in rows[2]["remark"]
    assert 516_096 % (1024 * 24) == 0
    assert "extrapolated: micro batch 8 instead of 16" in rows[4]["remark"]
    assert "extrapolated: beyond 128 GPUs" in rows[5]["remark"]
    shares = [row["step"]["share"] for row in rows if row["step"]]
    assert all(
        each["micro_batch"] * each["accumulation"] * 1024 * row["gpus"] == 524_288
        for each, row in zip(shares, (row for row in rows if row["step"]), strict=True)
    )


def test_a_slow_network_costs_and_a_long_step_mends(capsys: pytest.CaptureFixture[str]) -> None:
    def efficiency(*more: str) -> float:
        found = facts(capsys, "--preset", "gpt2-350m", "--gpu", "a100", "--nodes", "4", *more)
        return float(found["row"]["efficiency"])

    assert efficiency("--network-gbit-s", "25") < 0.6 < efficiency() < 1
    assert efficiency("--network-gbit-s", "25", "--train.tokens_per_step", "4194304") > 0.65
    assert efficiency("--network-gbit-s", "25", "--efficiency", "0.4") < efficiency("--network-gbit-s", "25")


def test_half_a_node_has_half_of_its_network(capsys: pytest.CaptureFixture[str]) -> None:
    def network(kind: str, gpus: int) -> float:
        found = facts(capsys, "--gpu", kind, "--gpus-per-node", str(gpus), "--nodes", "2")
        return float(found["inputs"]["fabric"]["network_gbit_s"])

    assert [network("a100", gpus) for gpus in (8, 4, 1, 16)] == [1600, 800, 200, 1600]
    assert [network("v100", gpus) for gpus in (8, 4, 1)] == [400, 200, 100], "four adapters"
    assert [network("rtx4090", gpus) for gpus in (8, 1)] == [25, 25], "one adapter"
    text = told(capsys, "--gpu", "a100", "--gpus-per-node", "4")
    assert re.search(r"--network-gbit-s +800 Gbit/s a node +default +for 4 of 8 GPUs of a DGX A100: ", text)


# Disk -------------------------------------------------------------------------------------------------------------


def test_a_real_checkpoint_is_as_large_as_foretold(shared_data: Manifest, tmp_path: Path) -> None:
    run, settings = RunDir(tmp_path / "run"), tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=2) == 0
    found = {path.name: path.stat().st_size for path in tiny.newest(run).path.iterdir()}
    metrics = found.pop("metrics.jsonl")
    foretold = storage.checkpoint_bytes(settings, ranks=2)
    assert sum(found.values()) == pytest.approx(foretold, rel=0.01)
    state = sum(size for name, size in found.items() if name.startswith("state-"))
    assert state - storage.STATE_BYTES * storage.stored_parameters(settings.model) < 0.03 * state
    lines = run.metrics.read_text().splitlines()
    assert metrics <= len(lines) * storage.METRICS_LINE_BYTES < 2 * metrics
    assert storage.kept(settings, save_steps=3) == len(list(run.checkpoints.iterdir())) == 4
    whole = storage.storage(settings, data_tokens=12_100, ranks=2, save_steps=3)
    shards = [path.stat().st_size for path in Path(shared_data.where).glob("*.npy")]
    assert sum(shards) == pytest.approx(2 * (12_100 + 1000) + 128 * len(shards))
    assert whole.data == 2 * (12_100 + 512) + 128 * 2


@pytest.mark.parametrize(("name", "parameters"), PRESETS.items(), ids=PRESETS)
def test_checkpoints_of_the_presets_by_arithmetic(name: str, parameters: int) -> None:
    config = config_io.load(config_io.presets()[name])
    assert storage.stored_parameters(config.model) == parameters
    assert storage.checkpoint_bytes(config, ranks=8) == pytest.approx(12 * parameters, rel=1e-3)


def test_what_was_measured_of_124m() -> None:
    """bench/results/checkpoint.md has 1.49 GB."""
    assert storage.checkpoint_bytes(Config(), ranks=1) == pytest.approx(1.49e9, rel=0.005)


def test_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "a100", "--checkpoint.keep_last", "2", "--checkpoint.keep_every_steps", "1000"]
    stored = facts(capsys, *arguments)["storage"]
    assert (
        stored["checkpoints"] == 2 + 19
    )  # of 19,073 steps, saved every 15 min: no thousand need be among the last two
    often = facts(capsys, *arguments, "--checkpoint.every_steps", "1000")
    assert often["storage"]["checkpoints"] == 1 + 19  # of these the 19th thousand is
    assert "at most: data 20.02 in 101 shards, 20 + 2 checkpoints" in told(
        capsys, *arguments, "--checkpoint.every_steps", "1000"
    )
    assert (stored["data"], stored["shards"]) == (2 * (19_073 * 524_288 + 10_485_760) + 128 * 101, 101)
    assert facts(capsys, "--gpu", "a100", "--data-tokens", "1e9")["storage"]["shards"] == 11


def left_by_pruning(config: Config, saved: Sequence[int]) -> set[int]:
    """What a run keeps of the steps it saves, one after another."""
    there: set[int] = set()
    for step in sorted(saved):
        there.add(step)
        there -= checkpoint.outdated(there, config.checkpoint) - {config.decay_begins}
    return there


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("keep_every", [None, 7, 100, 300])
@pytest.mark.parametrize("keep_last", [1, 2, 5])
@pytest.mark.parametrize("steps", [30, 1190, 1200])
def test_what_is_kept_is_what_pruning_leaves(schedule: Any, keep_every: int | None, keep_last: int, steps: int) -> None:
    config = Config(
        train=TrainConfig(total_steps=steps),
        optimizer=OptimizerConfig(schedule=schedule),
        checkpoint=CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every),
    )
    always = [steps] if config.decay_begins is None else [steps, config.decay_begins]
    for save_steps in (1, 10, 100, 500):
        left = left_by_pruning(config, [*range(save_steps, steps, save_steps), *always])
        assert storage.kept(config, save_steps=save_steps) == len(left), save_steps
    source = random.Random(1)
    for _ in range(20):  # times that nobody knows before
        left = left_by_pruning(config, [*source.sample(range(1, steps), k=20), *always])
        assert storage.kept(config, save_steps=None) >= len(left)


def test_what_is_kept_by_hand() -> None:
    """Saved every 10 steps up to 1190: 300, 600 and 900, and the last two."""
    saves = CheckpointConfig(keep_last=2, keep_every_steps=300)
    config = Config(train=TrainConfig(total_steps=1190), checkpoint=saves)
    assert storage.kept(config, save_steps=10) == storage.kept(config, save_steps=None) == 5


def test_the_disk_has_room_for_the_one_resumed_from() -> None:
    """As the check before the first step asks for it: the last three, one being written, and that."""
    stored = storage.storage(Config(), data_tokens=10**9, ranks=8, save_steps=None)
    assert stored.peak == stored.data + 5 * stored.checkpoint + stored.logs


# A run's own numbers ----------------------------------------------------------------------------------------------


def written(tmp_path: Path, attempts: Sequence[Any], **values: Any) -> RunDir:
    config = Config(train=TrainConfig(total_steps=19_000, micro_batch_size=16))
    return written_runs.write(tmp_path / "seen", attempts, config=config, **values)


def test_from_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two nodes × 4: steps of 11 to 200 have 1,011 to 1,200 tokens/s, half of an hour four times and three crashes."""
    crashed = [attempt(number, cause=Cause.CRASHED, last_step=120, saved_step=100) for number in (1, 2, 3)]
    run = written(tmp_path, [*crashed, attempt(4, first_step=100, cause=Cause.FINISHED, last_step=200)], mfu=0.25)
    with run.metrics.open("a") as file:
        for step, stall_ms, save_s in ((100, 300.0, 9.0), (150, 500.0, 12.0), (200, 400.0, 10.0)):
            file.write(json.dumps({"step": step, "save_s": save_s, "save_stall_ms": stall_ms}) + "\n")
        began = 1_769_832_000  # 2026-01-31T04:00:00Z
        file.write(json.dumps({"step": 103, "loss": 1.0, "ms": 2000.0, "unix_s": began + 95.0}) + "\n")
    seen = measured.observe(run.path)
    assert (seen.gpus, seen.nodes, seen.gpus_per_node, seen.failures) == (8, 2, 4, 3)
    assert seen.tokens_per_s_per_gpu.value == pytest.approx((1000 + 110.5) / 8, rel=0.01)
    assert seen.start_s is not None
    assert seen.start_s.value == pytest.approx(95 - 3 * 2)
    assert seen.node_hours == pytest.approx(4)
    found = facts(capsys, "--from", run.path, "--gpu", "a100", "--nodes", "2,4")
    assert found["steps"] == 19_000
    assert found["inputs"]["stall_s"] == pytest.approx(0.4)
    assert found["inputs"]["save_s"] == pytest.approx(10)
    assert found["losses"]["mtbf_s"] == pytest.approx(4 / 3 * 3600 / 4)
    told_of = origins(found)
    for name in ("--tokens-per-s-per-gpu", "--stall-s", "--save-s", "--start-s", "--mtbf-hours", "--gpus-per-node"):
        assert told_of[name] == "measured", name
    assert told_of["--network-gbit-s"] == "default"
    assert found["rows"][0]["efficiency"] == pytest.approx(1, abs=1e-6)
    assert [row["remark"] for row in found["rows"]] == ["as measured", "modelled"]
    text = told(capsys, "--from", run.path, "--gpu", "a100", "--start-s", "7")
    assert re.search(r"--tokens-per-s-per-gpu .* measured +median of \d+ steps of seen, 8 ranks, MFU 25.0%", text)
    assert re.search(r"--mtbf-hours +1.333 h .* measured +3 crashes in 4.0 node-hours of seen", text)
    assert re.search(r"--start-s +7 s a start +flag", text)


def test_from_a_run_of_another_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its rate counts by FLOPs; its checkpoints say nothing."""
    run = written(tmp_path, [attempt(1, cause=Cause.FINISHED)])
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 100, "save_s": 9.0, "save_stall_ms": 300.0}) + "\n")
    small, large = (
        facts(capsys, "--from", run.path, "--gpu", "a100", "--nodes", "2", "--preset", name)
        for name in ("gpt2-124m", "gpt2-350m")
    )
    flops = [config_io.load(config_io.presets()[name]).model.flops_per_token for name in ("gpt2-124m", "gpt2-350m")]
    rates = [found["inputs"]["base"]["tokens_per_s_per_gpu"] for found in (small, large)]
    assert rates[0] / rates[1] == pytest.approx(flops[1] / flops[0])
    assert (origins(small)["--save-s"], origins(large)["--save-s"]) == ("measured", "default")


def test_from_a_run_that_was_trained(capsys: pytest.CaptureFixture[str], shared_data: Manifest, tmp_path: Path) -> None:
    run, settings = RunDir(tmp_path / "run"), tiny.config(shared_data.where)
    assert tiny.run_ranks(run, settings, nproc=2) == 0
    found = facts(capsys, "--from", run.path, "--gpu", "a100")
    assert found["steps"] == 12
    told_of = origins(found)
    assert {told_of[name] for name in ("--tokens-per-s-per-gpu", "--stall-s", "--save-s", "--start-s")} == {"measured"}
    assert told_of["--mtbf-hours"] == "default"
    assert 0 < found["inputs"]["start_s"] < 300
    seen = measured.observe(run.path)
    assert found["step"]["gpus"] == seen.gpus == 2
    assert seen.stall_s is not None
    assert seen.save_s is not None
    assert 0 < seen.stall_s.value < seen.save_s.value


def test_nodes_that_the_step_cannot_be_dealt_to_name_the_setting_and_whence_their_gpus_are(tmp_path: Path) -> None:
    run = written(tmp_path, [attempt(1)])
    with pytest.raises(
        UsageError, match=r"; try --train\.tokens_per_step \d+, or other --gpus-per-node than 4 \(.*as in seen\)"
    ):
        plan.main(["--from", str(run.path), "--gpu", "a100", "--nodes", "999"])


def test_preemptions_are_no_failures(tmp_path: Path) -> None:
    ends = [Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.STOPPED, None, Cause.FINISHED]
    run = written(tmp_path, [attempt(number, cause=cause) for number, cause in enumerate(ends, start=1)])
    assert measured.observe(run.path).failures == 0


def test_a_crash_in_a_short_run_says_nothing_of_the_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Six minutes on two nodes."""
    run = written(tmp_path, [attempt(1, cause=Cause.CRASHED, ended="2026-01-31T01:06:00Z")])
    text = told(capsys, "--from", run.path, "--gpu", "a100", "--nodes", "4")
    told_so = re.search(
        r"--mtbf-hours +6,300 h .* default .*; 1 crash in 0.2 node-hours of seen are too few to tell", text
    )
    assert told_so, text


# What it says -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], type[Gpt2hpcError], str]] = {
    "an unknown GPU": (["--gpu", "a10o"], UsageError, "--gpu=a10o is unknown; did you mean a100? the known ones are v100, a100,"),
    "no count": (["--nodes", "1,x"], UsageError, "--nodes=1,x is not a count"),
    "no nodes": (["--nodes", "0"], UsageError, "--nodes=0 is not a count"),
    "no GPUs": (["--gpus-per-node", "0"], UsageError, "--gpus-per-node=0 must be 1 or more"),
    "a percentage": (["--mfu", "40"], UsageError, "--mfu=40 must be 1 or below"),
    "nothing": (["--network-gbit-s", "0"], UsageError, "--network-gbit-s=0 must be above 0"),
    "no time": (["--time", "soon"], UsageError, "--time=soon is not a time"),
    "too short a job": (["--time", "2"], UsageError, "--time is 120 s, of which a start takes 180 s"),
    "three nodes": (["--nodes", "3"], UsageError, "--nodes=3: train.tokens_per_step=524288 is not a multiple of 1024 × 24 GPUs"),
    "constant failure": (["--mtbf-hours", "1e-4"], UsageError, "over 10 times its work; save more often"),
    "near to it": (["--mtbf-hours", "0.07", "--gpu", "a100"], UsageError, "over 10 times its work; save more often"),
    "constant saves": (
        ["--gpu", "a100", "--checkpoint.every_steps", "1", "--save-s", "60"],
        UsageError,
        "--checkpoint.every_minutes: a save every 0.401 s, which takes 60 s, makes a run lose over 10 times its work; save every",
    ),
    "half a word": (["--mtbf-of", "job"], UsageError, "give that too"),
    "no run": (["--from", "/nowhere"], RunDirError, "--from=/nowhere is not a run directory"),
    "a typo": (["--nodse", "3"], UsageError, "did you mean --nodes?"),
    "a wrong setting": (["--train.micro_batch_size", "x"], ConfigError, "train.micro_batch_size=x is not valid"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_planned(arguments: list[str], kind: type[Gpt2hpcError], words: str) -> None:
    with pytest.raises(kind) as caught:
        plan.main(arguments)
    assert words in caught.value.line
    assert type(caught.value) is kind


def test_a_run_that_has_logged_no_step(tmp_path: Path) -> None:
    run = written_runs.write(tmp_path / "run", [attempt(1)], steps=0)
    with pytest.raises(DataError, match="has logged no step yet"):
        plan.main(["--from", str(run.path)])


def test_every_number_has_an_origin(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--preset", "gpt2-774m", "--gpu", "h100", "--nodes", "2", "--mfu", "0.4")
    listed = text.partition("Assumptions\n")[2].splitlines()
    assert len(listed) >= 20
    for line in listed:
        assert re.search(r" (flag|site|settings|measured|default)( |$)", line), line
    assert re.findall(r"^  \((\d+)\)", text, re.MULTILINE) == [str(number) for number in range(1, 15)]
    for default in (line for line in listed if " default " in line):
        assert len(default.split(" default ")[1].split()) > 2, f"no source: {default}"


def test_gpus_that_are_too_small_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "DOES NOT FIT" in told(capsys, "--preset", "gpt2-1558m", "--gpu", "rtx4090")
    assert "DOES NOT FIT" not in told(capsys, "--preset", "gpt2-1558m", "--gpu", "a100")


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The largest model on eight cards of 24 GB: what helps is named, and with it the plan says that it fits."""
    base = ("--preset", "gpt2-1558m", "--gpu", "rtx4090")
    text = told(capsys, *base)
    assert "35.0 GB  of 24 at a micro batch of 2: DOES NOT FIT: try " in text
    remedy = text.partition("DOES NOT FIT: try ")[2].partition(" (14)")[0]
    assert remedy == "--train.shard_optimizer true --train.micro_batch_size 1"
    helped = facts(capsys, *base, *remedy.split())
    assert helped["fits"]
    assert helped["memory"]["optimizer"] < 0.2 * facts(capsys, *base)["memory"]["optimizer"]
    assert ": fits (14)" in told(capsys, *base, *remedy.split())
    hopeless = told(capsys, *base, "--gpus-per-node", "1", "--train.tokens_per_step", "2048")
    assert "DOES NOT FIT: choose a GPU with more memory" in hopeless


def test_auto_is_the_most_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--preset", "gpt2-1558m", "--gpu", "a100-40", "--train.micro_batch_size", "auto")
    assert facts(capsys, *base)["step"]["share"]["micro_batch"] == 2
    recomputed = facts(capsys, *base, "--train.activation_checkpointing", "true")
    assert (recomputed["step"]["share"]["micro_batch"], recomputed["fits"]) == (8, True)
    assert "auto: the most of which a step fits (14)" in told(capsys, *base)


def test_what_memory_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks computed twice slow the default rate by their FLOPs; a sharded optimizer sends the weights after the step."""
    base = ("--preset", "gpt2-1558m", "--gpu", "a100", "--nodes", "2")
    plain = facts(capsys, *base)
    twice = facts(capsys, *base, "--train.activation_checkpointing", "true")
    model = config_io.load(config_io.presets()["gpt2-1558m"]).model
    more = (24 * 48 * 1600**2 + 4 * 48 * 1600 * 1024) / model.flops_per_token
    ratio = plain["compute_tokens_per_s_per_gpu"] / twice["compute_tokens_per_s_per_gpu"]
    assert ratio == pytest.approx(1 + more, rel=1e-3)
    assert 1.25 < ratio < 1.34
    given = facts(capsys, *base, "--train.activation_checkpointing", "true", "--tokens-per-s-per-gpu", "9000")
    assert given["inputs"]["base"]["tokens_per_s_per_gpu"] == 9000
    sharded = facts(capsys, *base, "--tokens-per-s-per-gpu", "9000", "--train.shard_optimizer", "true")
    whole = facts(capsys, *base, "--tokens-per-s-per-gpu", "9000")
    sent_s = 15 / 16 * 4 * PRESETS["gpt2-1558m"] / (0.8 * 200e9)  # the slower of NVLink and 1600 Gbit/s / 8
    calls = 12 * 48 + 4  # one for each parameter, some 10 to 100 µs each
    more_s = sharded["step"]["exposed_s"] - whole["step"]["exposed_s"]
    assert sent_s + calls * 10e-6 < more_s < sent_s + calls * 100e-6


def test_the_worked_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The page shows what the command prints, and the numbers that it works out by hand are those of the command."""
    text = PAGE.read_text()
    example = re.search(r"```sh\n(gpt2hpc plan [^\n]*)\n```\n\n```\n(.*?)\n```", text, re.DOTALL)
    assert example
    arguments = shlex.split(example[1].partition("#")[0])[2:]
    assert told(capsys, *arguments).rstrip() == example[2]
    found = facts(capsys, *arguments)
    steps, batch, gpus = 19_073, 524_288, 16
    flops = 6 * 354_823_168 + 12 * 24 * 1024 * 1024
    computed = batch / gpus / (0.45 * 312e12 / flops)
    bytes_ = 354_871_296 * 4
    latency = 8.4e-6 + 2 * (12 * 3.4e-6 + 3 * 9.6e-6)
    reduced = 2 * 15 / 16 * bytes_ / (0.8 * 400e9 / 8) + 55 * latency
    assert found["step"]["communication_s"] == pytest.approx(reduced)
    assert found["step"]["compute_s"] == pytest.approx(computed, rel=0.001)  # less what one node's communication costs
    for worked_out in (
        f"{reduced * 1e3:.1f} ms",
        f"{computed:.3f} s",
        f"{bytes_ / 1e9:.3f} GB",
        f"{latency * 1e6:.0f} µs",
    ):
        assert worked_out in text, worked_out
    assert found["tokens"] == steps * batch
    assert found["work_s"] == pytest.approx(
        steps * (found["step"]["compute_s"] + found["step"]["exposed_s"]) + 78 * found["validation_s"]
    )
    assert found["gpu_hours"] == pytest.approx(found["wall_s"] * gpus / 3600)


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "--gpu", "a100")
    assert {"gpu_hours", "wall_s", "jobs", "rows", "storage", "best", "losses", "intervals", "inputs"} <= found.keys()
    assert found["inputs"]["config"] == json.loads(json.dumps(dataclasses.asdict(Config())))


def test_what_muon_and_bf16_reduction_save() -> None:
    """4 bytes of each parameter inside the blocks, on disk and on the GPU; half of the bytes that are sent, in as many buckets."""
    plain, muon = Config(), Config(optimizer=OptimizerConfig(name="muon"))
    inner = 12 * 12 * 768**2
    saved = storage.checkpoint_bytes(plain, ranks=8) - storage.checkpoint_bytes(muon, ranks=8)
    assert saved == plain.state_bytes - muon.state_bytes == 4 * inner
    held = [memory.needed(each, gpus=8, micro_batch=1).optimizer for each in (plain, muon)]
    assert held[0] - held[1] == 4 * inner
    full, half = (traffic_of(Config(train=TrainConfig(reduce_dtype=dtype))) for dtype in ("fp32", "bf16"))
    fabric = Fabric(gpus_per_node=8, link_gbyte_s=300, network_gbit_s=10)
    assert half.total_s(fabric, 64) == pytest.approx(full.total_s(fabric, 64) / 2, rel=0.05)


def test_a_start_that_was_noted_counts_from_its_process(tmp_path: Path) -> None:
    noted = written_runs.attempt(1, start_up={"imports": 20.0, "warm-up": 60.0, "first step": 3.0})
    seen = measured.observe(written_runs.write(tmp_path / "noted", [noted]).path)
    assert seen.start_s is not None
    assert seen.start_s.value == pytest.approx(80.0)
