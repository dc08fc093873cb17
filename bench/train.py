"""Training steps beside others': `python -m bench.train [--shapes gpt2-124m] [--ways eager compiled] [--threads 2] [--steps 20]`.

Everyone begins with the same weights and takes the same steps over the same tokens (dropout 0): forward, backward, clipping, AdamW.
Each is a process of its own, all of one way at once; they take turns of a few steps while the others sleep, and the first turn,
which warms up and compiles, is not counted. The losses of all steps are compared. What is compared:

    gpt2hpc                what the trainer does with each step
    gpt2hpc, CUDA graphs   the same with train.cuda_graphs, where it is compiled for a GPU
    nanoGPT-style          the textbook: full logits returned, torch's default AdamW (nanoGPT's own is fused on CUDA)
    transformers           GPT2LMHeadModel in the same loop
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any, Literal, cast

from bench import report
from gpt2hpc import cli, config_io
from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.config import Config, ModelConfig, PrecisionName
from gpt2hpc.config_rules import grad_accum_steps

Way = Literal["eager", "compiled"]
OURS = "gpt2hpc"
REPLAYED = "gpt2hpc, CUDA graphs"
OTHERS = ("nanoGPT-style", "transformers")
TURNS = {"cpu": 2, "cuda": 5}
"""Steps of one where nothing is said; of the first turn nothing is counted."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is trained: a model, and sequences a micro batch, micro batches a step on a CPU and on a GPU."""

    model: ModelConfig
    cpu: tuple[int, int]
    cuda: tuple[int, int]


def shapes() -> dict[str, Shape]:
    presets = {name: config_io.load(path).model for name, path in config_io.presets().items()}
    small = ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256)
    tiny = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32)
    return {
        "tiny": Shape(tiny, (4, 2), (4, 2)),
        "6x384": Shape(small, (4, 1), (64, 1)),
        "gpt2-124m": Shape(presets["gpt2-124m"], (1, 1), (16, 1)),
        "gpt2-350m": Shape(presets["gpt2-350m"], (1, 1), (16, 1)),
        "gpt2-774m": Shape(presets["gpt2-774m"], (1, 1), (8, 1)),
        "gpt2-1558m": Shape(presets["gpt2-1558m"], (1, 1), (4, 1)),
    }


def settings(
    shape: Shape,
    device: str,
    *,
    way: Way,
    precision: PrecisionName,
    steps: int,
    rows: int | None = None,
    micro_batches: int | None = None,
) -> Config:
    """`rows` are sequences a micro batch, instead of the shape's; `micro_batches` those of a step."""
    plain = Config()
    usual_rows, usual = shape.cuda if device == "cuda" else shape.cpu
    rows, micro_batches = rows or usual_rows, micro_batches or usual
    tokens = rows * micro_batches * shape.model.block_size
    train = dataclasses.replace(
        plain.train,
        device="cuda" if device == "cuda" else "cpu",
        precision=precision,
        compile=way == "compiled",
        micro_batch_size=rows,
        tokens_per_step=tokens,
        total_steps=steps,
    )
    optimizer = dataclasses.replace(plain.optimizer, warmup_tokens=tokens * (steps // 4))
    model = dataclasses.replace(shape.model, dropout=0.0)
    return dataclasses.replace(plain, model=model, train=train, optimizer=optimizer)


def precisions(device: str) -> list[PrecisionName]:
    """Those that it has instructions for."""
    import torch

    if device == "cpu":
        in_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return ["fp32", "bf16"] if in_bf16 else ["fp32"]
    return ["fp32", "fp16", "bf16"] if torch.cuda.get_device_capability()[0] >= 8 else ["fp32", "fp16"]


# A contender's process -------------------------------------------------------------------------------------------


def serve(name: str, config: Config, threads: int) -> None:
    """Answer each line with a number on stdin by taking so many steps: a line of JSON with what they took."""
    # In torch's own cache the gradients of our operators would stay as they were when it was filled.
    compile_cache.settle(os.environ, DistEnv.from_env({}))
    from bench.trainers import CONTENDERS, quiet_stdout

    with quiet_stdout():
        import torch

        torch.set_num_threads(threads)
        device = torch.device(config.train.device)
        began = time.perf_counter()
        contender = CONTENDERS[name](config, device)
    number = 0
    for line in sys.stdin:
        with quiet_stdout():
            losses = []
            for _ in range(int(line)):
                losses.append(contender.step(number))
                number += 1
            values = [float(loss) for loss in losses]  # waits for the device
            seconds = time.perf_counter() - began
        print(json.dumps({"losses": values, "seconds": seconds, "peak_gib": report.peak_gib(device.type)}), flush=True)
        began = time.perf_counter()


@dataclasses.dataclass
class Process:
    """A contender that waits for its turn."""

    popen: subprocess.Popen[str]
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    began: float = 0.0

    @classmethod
    def started(cls, name: str, words: Sequence[str]) -> Process:
        command = [sys.executable, "-m", "bench.train", *words, "--serve", name]
        return cls(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def turn(self, steps: int) -> None:
        """Raises RuntimeError where the process has ended."""
        self.begin(steps)
        self.finish()

    def begin(self, steps: int) -> None:
        self.began = time.perf_counter()
        print(steps, file=cast("IO[str]", self.popen.stdin), flush=True)

    def finish(self) -> None:
        began, answers = self.began, cast("IO[str]", self.popen.stdout)
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.popen.args))} ended with exit code {self.popen.wait()}")
        told = json.loads(answer)
        if self.turns:
            told["seconds"] = time.perf_counter() - began
        self.turns.append(told)

    def end(self) -> None:
        cast("IO[str]", self.popen.stdin).close()
        self.popen.wait()
        cast("IO[str]", self.popen.stdout).close()

    @property
    def step_s(self) -> list[float]:
        """Of each turn but the first."""
        return [turn["seconds"] / len(turn["losses"]) for turn in self.turns[1:]]

    @property
    def losses(self) -> list[float]:
        return list(itertools.chain.from_iterable(turn["losses"] for turn in self.turns))


# All by turns ---------------------------------------------------------------------------------------------------


def measure(words: Sequence[str], steps: int, turn: int, names: Sequence[str]) -> dict[str, Any]:
    """Each contender's seconds a step by turns, and its losses."""
    processes = {name: Process.started(name, words) for name in names}
    try:
        for process in processes.values():
            process.begin(turn)  # all at once: compiling is not measured
        for process in processes.values():
            process.finish()
        for _ in range(steps // turn - 1):
            for process in processes.values():
                process.turn(turn)
    finally:
        for process in processes.values():
            process.end()
    return {
        name: {"step_s": each.step_s, "losses": each.losses, "peak_gib": each.turns[-1]["peak_gib"]}
        for name, each in processes.items()
    }


def table(facts: dict[str, Any]) -> str:
    threads = "" if "gpu" in facts["machine"] else f"; {cli.plural(facts['threads'], 'thread')} each"
    head = "| trained | tokens a step | trainer | tokens/s | FLOP/s | our speed-up | losses differ by | peak GiB |"
    return "\n".join(
        [
            "# Training steps",
            "",
            *report.made(facts),
            f"{facts['steps']} steps each, by turns of {facts['turn']} of which the first is not counted; dropout 0{threads}.",
            "FLOP: 6N + 12·L·d·T a token. The speed-up is the other's time by ours in the same turn, as the median and the spread over",
            "turns. Losses: the largest difference from ours in any step.",
            "",
            head,
            "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
            *(
                row(run, name, facts["machine"].get("peak_flops"))
                for run in facts["runs"]
                for name in run["contenders"]
            ),
            "",
        ]
    )


def row(run: dict[str, Any], name: str, peak_flops: float | None) -> str:
    found, ours = run["contenders"][name], run["contenders"][OURS]
    ratios = [other / own for other, own in zip(found["step_s"], ours["step_s"], strict=True)]
    off = max(abs(a - b) for a, b in zip(found["losses"], ours["losses"], strict=True))
    rate = statistics.median(run["tokens_per_step"] / each for each in found["step_s"])
    flops = rate * run["flops_per_token"]
    accumulated = [run["micro_batches"]] if run["micro_batches"] > 1 else []
    cells = (
        f"{run['shape']}, {run['way']}, {run['precision']}",
        " × ".join(map(str, (*accumulated, run["rows"], run["block_size"]))),
        name,
        f"{rate:,.0f}",
        f"{flops / peak_flops:.1%} MFU" if peak_flops else f"{flops / 1e9:,.0f} G",
        "" if name == OURS else f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})",
        "" if name == OURS else f"{off:.1e}",
        f"{found['peak_gib']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(shapes()), default=["6x384", "gpt2-124m"])
    parser.add_argument("--ways", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: what the device has"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--name", default="train", help="of the files in bench/results")
    parser.add_argument("--rows", type=int, help="sequences a micro batch, instead of the shape's")
    parser.add_argument("--micro-batches", type=int, help="a step, instead of the shape's")
    parser.add_argument("--turn", type=int, help=f"steps of a turn (default: {TURNS['cpu']}, on a GPU {TURNS['cuda']})")
    everyone = (OURS, REPLAYED, *OTHERS)
    parser.add_argument("--contenders", nargs="+", choices=everyone, help="ours always; default: all")
    parser.add_argument("--serve", choices=everyone, help=argparse.SUPPRESS)
    options = parser.parse_args()
    report.refuse_absent(parser, options.device)
    options.precisions = options.precisions or precisions(options.device)
    turn = TURNS[options.device] if options.turn is None else options.turn
    for name in ("turn", "rows", "micro_batches"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value} must be 1 or more")
    if options.steps < 2 * turn or options.steps % turn:
        parser.error(
            f"--steps={options.steps} must be a multiple of {turn}, and {2 * turn} or more: the first turn is not counted"
        )
    if REPLAYED in (options.contenders or ()) and (options.device == "cpu" or "eager" in options.ways):
        parser.error(f"--contenders {REPLAYED!r} wants --device cuda and --ways compiled: only that can be replayed")
    asked = {"steps": options.steps, "rows": options.rows, "micro_batches": options.micro_batches}
    if options.serve:
        [shape], [way], [precision] = options.shapes, options.ways, options.precisions
        config = settings(shapes()[shape], options.device, way=way, precision=precision, **asked)
        serve(options.serve, config, options.threads)
        return
    runs = []
    for shape, way, precision in itertools.product(options.shapes, options.ways, options.precisions):
        words = ["--shapes", shape, "--ways", way, "--precisions", precision, "--device", options.device]
        words += ["--threads", str(options.threads), "--steps", str(options.steps)]
        words += ["--turn", str(turn)]
        words += ["--rows", str(options.rows)] if options.rows else []
        words += ["--micro-batches", str(options.micro_batches)] if options.micro_batches else []
        config = settings(shapes()[shape], options.device, way=way, precision=precision, **asked)
        names = dict.fromkeys([OURS, *(options.contenders or everyone)])
        if options.device == "cpu" or way == "eager":
            names.pop(REPLAYED, None)
        run = {
            "shape": shape,
            "way": way,
            "precision": precision,
            "rows": config.train.micro_batch_size,
            "micro_batches": grad_accum_steps(config, world_size=1),
            "block_size": config.model.block_size,
            "tokens_per_step": config.train.tokens_per_step,
            "flops_per_token": config.model.flops_per_token,
            "contenders": measure(words, options.steps, turn, list(names)),
        }
        runs.append(run)
        print("\n".join(row(run, name, None) for name in names), flush=True)
    facts = {
        **report.facts(options.device),
        "threads": options.threads,
        "steps": options.steps,
        "turn": turn,
        "runs": runs,
    }
    report.write(options.name, facts, table(facts))


if __name__ == "__main__":
    main()
