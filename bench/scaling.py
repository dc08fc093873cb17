"""How a step grows with processes and slower networks, beside what `gpt2hpc plan` foretells: `python -m bench.scaling`.

Each process has one thread, and computes the same micro batch in every row (so the work grows with them), with this project's own
step: DDP over gloo, clipping, AdamW. Measured are

    alone         1, 2 and 4 processes that reduce nothing: what they cost each other in cores, caches and memory
    loopback      the same with DDP, on the machine's own loopback
    RATE          each process a node: a network namespace with a link of that rate to a bridge (bench/network.py); needs root
    RATE, bf16    the same with train.reduce_dtype=bf16, which sends half the bytes

What communication costs is a step beside that of as many processes alone, so that too few cores do not look like a slow network.
Beside each row that has a rate stands what the plan's formulae (gpt2hpc/planning/scaling.py) make of the step alone and that rate:
with the plan's own share of the rate, 0.8, and with the share that an all-reduce by itself was measured to reach.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench import network, report
from bench.network import Link, Node
from gpt2hpc.config import Config, DataConfig, ModelConfig, TrainConfig
from gpt2hpc.planning import inputs, scaling
from gpt2hpc.planning.hardware import BUS_EFFICIENCY

PROCESSES = (1, 2, 4)
RATES_MBIT = (2000.0, 500.0, 125.0)
BUCKETS_MIB = (5.0, 25.0, 100.0)
DDP_MIB = 25.0
MODEL = ModelConfig(
    n_layer=6, n_head=6, n_embd=384, block_size=128, vocab_size=8192, padded_vocab_size=8192, dropout=0.0
)
"""13.8 million parameters: 55 MB of gradients, three of DDP's buckets."""
MICRO_BATCH = 4
TIMEOUT_S = 900


@dataclass(frozen=True)
class Case:
    """`reduces` is False for processes that compute beside each other; `link` is None on loopback; `bucket_mib` is DDP's cap.

    `dtype` is that of the gradients on their way.
    """

    processes: int
    reduces: bool = True
    link: Link | None = None
    bucket_mib: float = DDP_MIB
    micro_batch: int = MICRO_BATCH
    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def name(self) -> str:
        if not self.reduces:
            return "alone"
        words = [f"{self.link.rate_mbit:g} Mbit/s" if self.link else "loopback"]
        if self.link and self.link.delay_ms:
            words.append(f"{self.link.delay_ms:g} ms")
        if self.dtype != "fp32":
            words.append(self.dtype)
        return ", ".join(words)


@dataclass(frozen=True)
class Measured:
    """Medians: of a step, of an all-reduce of one bucket, of the smallest one; seconds, None where nothing is reduced."""

    step_s: float
    bucket_s: float | None
    smallest_s: float | None
    steps_s: list[float]

    def bus_bytes_per_s(self, processes: int) -> float | None:
        """Bus bandwidth, as nccl-tests define it, of an all-reduce by itself."""
        if self.bucket_s is None:
            return None
        return 2 * (processes - 1) / processes * scaling.BUCKET_BYTES / self.bucket_s


# A rank ---------------------------------------------------------------------------------------------------------------


def config_of(case: Case) -> Config:
    tokens = case.micro_batch * MODEL.block_size * case.processes
    train = TrainConfig(
        micro_batch_size=case.micro_batch,
        tokens_per_step=tokens,
        total_steps=1000,
        device="cpu",
        reduce_dtype=case.dtype,
    )
    return Config(model=MODEL, train=train, data=DataConfig(dir="none"))


def rank(case: Case, steps: int) -> None:
    """Measure as one of the processes; the first prints what it found, as JSON."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from gpt2hpc.cluster.dist_env import DistEnv
    from gpt2hpc.training.learner import Learner
    from gpt2hpc.training.process_group import joined

    env = DistEnv.from_env(os.environ)
    with joined(env, torch.device("cpu")) as ranks:
        learner = Learner(config_of(case), ranks, lambda: None)
        if case.bucket_mib == DDP_MIB and case.reduces:
            learner.wrap()
        elif case.reduces:
            learner._wrapped = DistributedDataParallel(
                learner.model, gradient_as_bucket_view=True, bucket_cap_mb=case.bucket_mib
            )
        learner.warm_up()
        tokens = torch.randint(MODEL.vocab_size, (case.micro_batch, MODEL.block_size + 1))
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        learner.learn([batch], 0)
        ranks.barrier()
        times = []
        for step in range(1, steps + 1):
            began = time.perf_counter()
            learner.learn([batch], step)
            times.append(time.perf_counter() - began)
        slowest = max(ranks.gather(statistics.median(times)))
        reduced = smallest = None
        if case.reduces and case.processes > 1:
            reduced = _all_reduce_s(ranks, scaling.BUCKET_BYTES // 4)
            smallest = _all_reduce_s(ranks, 1)
        if ranks.is_first:
            print(json.dumps(dataclasses.asdict(Measured(slowest, reduced, smallest, times))))


def _all_reduce_s(ranks: Any, count: int) -> float:
    """Median of some all-reduces of so many fp32 numbers, by themselves."""
    import torch
    import torch.distributed as dist

    tensor, times = torch.ones(count), []
    for _ in range(6):
        ranks.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


# Starting them --------------------------------------------------------------------------------------------------------


def measure(case: Case, steps: int) -> Measured:
    """Start the processes of a case, and take what the first one found."""
    if case.link is None:
        return _started(case, steps, None)
    with network.emulated(case.processes, case.link) as nodes:
        return _started(case, steps, nodes)


def _started(case: Case, steps: int, nodes: list[Node] | None) -> Measured:
    address, port = (nodes[0].address, 29500) if nodes else ("127.0.0.1", _free_port())
    words = [sys.executable, "-m", "bench.scaling", "--rank", _spelled(case), "--steps", str(steps)]
    common = {
        "WORLD_SIZE": str(case.processes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started: list[subprocess.Popen[str]] = []
    try:
        for number in range(case.processes):
            variables = {"RANK": str(number), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **common}
            command = nodes[number].command(words) if nodes else words
            pipe = subprocess.PIPE if number == 0 else subprocess.DEVNULL
            started.append(subprocess.Popen(command, env={**os.environ, **variables}, stdout=pipe, text=True))
        said, _ = started[0].communicate(timeout=TIMEOUT_S)
        if any(process.wait(timeout=60) for process in started):
            raise SystemExit(f"{case}: a process failed, see above")
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
    return Measured(**json.loads(said.splitlines()[-1]))


def _spelled(case: Case) -> str:
    return json.dumps(dataclasses.asdict(case))


def _read(text: str) -> Case:
    facts = json.loads(text)
    return Case(**{**facts, "link": facts["link"] and Link(**facts["link"])})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# What the plan says ---------------------------------------------------------------------------------------------------


def foretold_s(case: Case, alone_s: float, *, efficiency: float) -> float:
    """A step by the plan's formulae: from that of as many processes alone, and the rate of the link."""
    assert case.link is not None
    fabric = scaling.Fabric(
        gpus_per_node=1, link_gbyte_s=1e3, network_gbit_s=case.link.rate_mbit / 1e3, efficiency=efficiency
    )
    share = scaling.Share(case.micro_batch, 1, MODEL.block_size)
    traffic = inputs.traffic_of(config_of(case))
    return scaling.step(
        fabric, traffic, share, gpus=case.processes, compute_tokens_per_s=share.tokens / alone_s
    ).seconds


def row(case: Case, found: Measured, alone: dict[int, float]) -> dict[str, Any]:
    """What a table says of a case; `alone` has the steps of so many processes that reduce nothing."""
    base = alone[case.processes]
    facts: dict[str, Any] = {
        "network": case.name,
        "processes": case.processes,
        "bucket_mib": case.bucket_mib,
        "step_s": found.step_s,
        "steps_s": found.steps_s,
        "communication": max(0.0, 1 - base / found.step_s),
        "efficiency": alone[1] / found.step_s,
        "smallest_all_reduce_s": found.smallest_s,
        "bus_bytes_per_s": found.bus_bytes_per_s(case.processes),
    }
    if case.link is not None and facts["bus_bytes_per_s"]:
        reached = facts["bus_bytes_per_s"] / (case.link.rate_mbit * 1e6 / 8)
        facts["reached"] = reached
        facts["plan_s"] = foretold_s(case, base, efficiency=BUS_EFFICIENCY)
        facts["plan_as_measured_s"] = foretold_s(case, base, efficiency=reached)
    return facts


def table(facts: dict[str, Any]) -> str:
    model = facts["model"]
    columns = ["network", "processes", "ms a step", "communication", "efficiency", "all-reduce alone, of the rate"]
    columns += ["plan, ms", "off", "plan with that share, ms", "off"]
    lines = [
        "# Scaling",
        "",
        f"{model['parameters'] / 1e6:.1f}M parameters, {model['gradient_bytes'] / 1e6:.0f} MB of gradients a step, half of it in bf16. "
        f"One micro batch of {MICRO_BATCH} × {MODEL.block_size} a step and process, of one thread. Medians of {facts['steps']} steps.",
        *report.made(facts),
        f"| {' | '.join(columns)} |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *(_line(each) for each in facts["rows"]),
        "",
        "*Communication* is the part of a step that as many processes alone do not need. *Efficiency* is the step of one process "
        "beside this one: with more processes than cores it falls without any network, as the rows *alone* show. *Plan* has formulae "
        "(4) to (6) of [docs/plan.md](../../docs/plan.md), from the step alone and the link's rate; *off* is beside the measured step.",
        "",
        *_buckets(facts["buckets"]),
    ]
    return "\n".join([*lines, *([f"Left out: {facts['left_out']}.", ""] if facts["left_out"] else [])])


def _buckets(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [f"DDP's buckets, {rows[0]['processes']} processes, ms a step:", ""]
    lines += [
        "| network | " + " | ".join(f"{cap:g} MiB" for cap in BUCKETS_MIB) + " |",
        "| --- |" + " ---: |" * len(BUCKETS_MIB),
    ]
    for name in dict.fromkeys(each["network"] for each in rows):
        own = {each["bucket_mib"]: each["step_s"] for each in rows if each["network"] == name}
        lines.append(f"| {name} | " + " | ".join(f"{own[cap] * 1e3:,.0f}" for cap in BUCKETS_MIB) + " |")
    return [*lines, ""]


def _line(each: dict[str, Any]) -> str:
    cells = [each["network"], each["processes"], f"{each['step_s'] * 1e3:,.0f}"]
    cells += ["" if each["network"] == "alone" else f"{each['communication']:.0%}", f"{each['efficiency']:.0%}"]
    cells.append(f"{each['reached']:.0%}" if "reached" in each else "")
    for key in ("plan_s", "plan_as_measured_s"):
        cells += [f"{each[key] * 1e3:,.0f}", f"{each[key] / each['step_s'] - 1:+.0%}"] if key in each else ["", ""]
    return f"| {' | '.join(map(str, cells))} |"


def cases(links: Sequence[Link]) -> list[Case]:
    several = [count for count in PROCESSES if count > 1]
    return [
        *(Case(count, reduces=False) for count in PROCESSES),
        *(Case(count) for count in several),
        *(Case(count, link=link, dtype=dtype) for link in links for dtype in ("fp32", "bf16") for count in several),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rates-mbit", type=float, nargs="*", default=RATES_MBIT)
    parser.add_argument(
        "--delay-ms", type=float, default=0.0, help="of a packet from node to node; needs netem in the kernel"
    )
    parser.add_argument("--rank", type=_read, help="be one of the processes of this case")
    arguments = parser.parse_args()
    for name, value in (("--steps", arguments.steps), *(("--rates-mbit", rate) for rate in arguments.rates_mbit)):
        if value <= 0:
            parser.error(f"{name}={value:g} must be above 0")
    if arguments.delay_ms < 0:
        parser.error(f"--delay-ms={arguments.delay_ms:g} must be 0 or above")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that namespaces are taken down
    if arguments.rank:
        rank(arguments.rank, arguments.steps)
        return
    links = [Link(rate, arguments.delay_ms) for rate in arguments.rates_mbit]
    left_out = network.lacking(links[0]) if links else "no rates were asked for"
    if left_out and arguments.delay_ms:
        raise SystemExit(f"--delay-ms={arguments.delay_ms:g}: {left_out}; leave it out, or use a kernel with sch_netem")
    alone: dict[int, float] = {}
    rows: list[dict[str, Any]] = []
    for case in cases([] if left_out else links):
        found = measure(case, arguments.steps)
        if not case.reduces:
            alone[case.processes] = found.step_s
        rows.append(row(case, found, alone))
        print(f"{case.name}, {case.processes}: {found.step_s * 1e3:,.0f} ms", flush=True)
    buckets = []
    for link in [] if left_out else links:
        for cap in BUCKETS_MIB:
            case = Case(2, link=link, bucket_mib=cap)
            buckets.append(row(case, measure(case, arguments.steps), alone))
            print(f"{case.name}, buckets of {cap:g} MiB: {buckets[-1]['step_s'] * 1e3:,.0f} ms", flush=True)
    parameters = inputs.traffic_of(config_of(Case(1))).parameters
    facts = {
        **report.facts("cpu", ["torch"]),
        "model": {"parameters": parameters, "gradient_bytes": 4 * parameters, **dataclasses.asdict(MODEL)},
        "steps": arguments.steps,
        "left_out": left_out,
        "rows": rows,
        "buckets": buckets,
    }
    report.write("scaling", facts, table(facts))


if __name__ == "__main__":
    main()
