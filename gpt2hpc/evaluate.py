"""`gpt2hpc evaluate`: HellaSwag and the validation loss of a run, of its checkpoints, or of any GPT-2, beside published numbers.

It keeps nothing between starts: one that was killed is started again. Where something else starts the ranks (srun, torchrun) it is one
of them, and the examples are split over all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from gpt2hpc import cli, durable, garbage, jobs
from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.dist_env import DistEnv, new_local_job
from gpt2hpc.cluster.launch import LocalJob, SignalRelay, count_gpus, run_attempt
from gpt2hpc.cluster.signals import SIGNALS
from gpt2hpc.config import DataConfig, DeviceName, ModelConfig, PrecisionName
from gpt2hpc.data import catalog, loader, manifest
from gpt2hpc.data.patience import HubDownError
from gpt2hpc.errors import EXIT_CODES, INTERNAL_ERROR, DataError, RunDirError, StoppedError, UsageError
from gpt2hpc.evaluation import examples, results
from gpt2hpc.evaluation.examples import Example
from gpt2hpc.evaluation.results import Result
from gpt2hpc.model import hf_weights
from gpt2hpc.run_dir import RunDir

if TYPE_CHECKING:
    from gpt2hpc.model.gpt import GPT
    from gpt2hpc.training.checkpoint import Checkpoint
    from gpt2hpc.training.precision import Precision
    from gpt2hpc.training.process_group import Ranks

LINE_EVERY_S = 30.0
STOPPING = "stopping; Ctrl-C again kills"


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc evaluate",
        description="How good is a model? HellaSwag's validation examples, and the loss over prepared validation data. Started under "
        "srun or torchrun, or with --nproc, it splits the work.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a run, a checkpoint, a directory of transformers, a .pt file, or gpt2, gpt2-medium, gpt2-large, gpt2-xl",
    )
    parser.add_argument("--all", action="store_true", help="every checkpoint of each run, not the newest alone")
    parser.add_argument(
        "--hellaswag",
        default=examples.HUB,
        metavar="SOURCE",
        help=f"its JSON Lines or parquet file, what `gpt2hpc stage --hellaswag` made, `none`, or (default) {examples.HUB}",
    )
    parser.add_argument(
        "--examples", type=int, metavar="N", help=f"the first N of them (default: all {results.ALL_EXAMPLES:,})"
    )
    parser.add_argument("--val", metavar="DATA", help="prepared data, whose validation split gives loss and perplexity")
    parser.add_argument("--val-tokens", type=int, metavar="N", help="the first N tokens of it (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="sequences of --val at once (default: 8)"
    )
    parser.add_argument("--device", choices=get_args(DeviceName), default="auto", help="(default: auto)")
    parser.add_argument("--precision", choices=get_args(PrecisionName), default="auto", help="(default: auto)")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes to start (default: one a GPU, or 1 on the CPU)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a model instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there too, as a JSON list")
    cli.add_examples(
        parser,
        "gpt2hpc evaluate runs/mine --all",
        "gpt2hpc evaluate openai-community/gpt2 --hellaswag hellaswag_val.jsonl --val data/mine --json",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    for name in ("examples", "val_tokens", "batch_size", "nproc"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}={value} must be 1 or more")
    if arguments.hellaswag == "none" and arguments.val is None:
        raise UsageError("nothing to measure: give --val DATA, or leave out --hellaswag none")
    jobs.require_torch()
    if arguments.out is not None:
        cli.check_out(arguments.out, example="results.json")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)  # now, rather than after an hour
    env = DistEnv.from_env(os.environ)
    if env.is_launched:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which our launcher holds back from ranks that save
    nproc = arguments.nproc or (1 if arguments.device == "cpu" else max(1, count_gpus()))
    if not env.is_launched and nproc > 1:
        return _started(argv, nproc)
    if env.is_launched and arguments.nproc is not None:
        raise UsageError(f"--nproc={nproc}, but this is one of several ranks already; drop --nproc")
    compile_cache.settle(os.environ, env)
    _rank(arguments, env)
    return 0


def _started(argv: Sequence[str], nproc: int) -> int:
    """The same command as ranks of this machine."""
    with tempfile.TemporaryDirectory(prefix="gpt2hpc-") as folder, SignalRelay(notice=STOPPING).installed() as relay:
        words = [word for word, before in zip(argv, ["", *argv], strict=False) if "--nproc" not in (word, before)]
        command = [
            sys.executable,
            "-m",
            "gpt2hpc.evaluate",
            *(word for word in words if not word.startswith("--nproc=")),
        ]
        code = run_attempt(
            LocalJob(tuple(command), RunDir(Path(folder)), nproc, new_local_job()), restart=0, relay=relay
        )
    if relay.last_attempt:
        return StoppedError.exit_code
    return code if code in EXIT_CODES else INTERNAL_ERROR


def _rank(arguments: argparse.Namespace, env: DistEnv) -> None:
    with garbage.unsought():
        from gpt2hpc.training import heap, precision
        from gpt2hpc.training.process_group import joined, select_device

    device = select_device(arguments.device, env)
    if device.type == "cpu":
        heap.keep_freed()
    with joined(env, device) as ranks:
        models = ranks.first_works(lambda: list(_models(arguments)))
        questions = ranks.first_works(lambda: _questions(arguments))
        chosen = precision.choose(arguments.precision, device)
        found: list[Result] = []
        for source in models:
            if not ranks.from_first(_is_there(source)):
                if ranks.is_first:
                    cli.warn(f"skipping {source}: it was removed meanwhile, as the run's retention wants it")
                continue
            found.append(_evaluated(source, questions, arguments, ranks, chosen))
            if ranks.is_first and arguments.json:
                cli.say(json.dumps(dataclasses.asdict(found[-1])))
        with ranks.first_decides():
            if ranks.is_first:
                if not arguments.json:
                    cli.say("\n".join(results.table(found)))
                if arguments.out is not None:
                    durable.publish_json(arguments.out, [dataclasses.asdict(result) for result in found])


def _questions(arguments: argparse.Namespace) -> list[Example]:
    if arguments.hellaswag == "none":
        return []
    try:
        return examples.load(arguments.hellaswag, limit=arguments.examples)
    except HubDownError as error:
        raise DataError(
            f"{error.what}; give --hellaswag none --val DATA, or where there is a network fetch it with `gpt2hpc stage --hellaswag`"
        ) from error


def _models(arguments: argparse.Namespace) -> Iterator[str]:
    """The models by name, each checkpoint by its own; `./gpt2` is a directory even though gpt2 is published.

    Raises DataError for what is not there, UsageError for `--all` of what is no run, RunDirError where nothing whole is there.
    """
    from gpt2hpc.training import checkpoint

    for source in arguments.models:
        if not _is_there(source):
            raise DataError(
                f"{source} does not exist; name a run, a checkpoint, a directory of transformers, a .pt file or one of "
                f"{', '.join(hf_weights.PUBLISHED)}"
            )
        run = RunDir(Path(source))
        is_run = not hf_weights.is_published(source) and run.checkpoints.is_dir()
        if arguments.all and not is_run:
            raise UsageError(f"--all is for runs, and {source} is none; leave it out")
        if arguments.all:
            whole = [found for found in reversed(checkpoint.found(run.checkpoints)) if _is_whole(found)]
            if not whole:
                raise RunDirError(f"{source} holds no whole checkpoint; give a run that has saved one")
            yield from (str(found.path) for found in whole)
        elif is_run or (not hf_weights.is_published(source) and checkpoint.found(run.path)):
            yield str(checkpoint.at(run.path, cli.warn).path)
        else:
            yield source


def _is_there(source: str) -> bool:
    return hf_weights.is_published(source) or Path(source).exists()


def _is_whole(found: Checkpoint) -> bool:
    if damage := found.damage():
        cli.warn(f"skipping the damaged checkpoint {found.path}: {damage}")
    return damage is None


def _evaluated(
    source: str, questions: Sequence[Example], arguments: argparse.Namespace, ranks: Ranks, precision: Precision
) -> Result:
    from gpt2hpc.evaluation import hellaswag
    from gpt2hpc.model.gpt import GPT
    from gpt2hpc.training import initial, state

    began = time.monotonic()
    loaded: list[initial.Weights] = []
    ranks.first_works(lambda: loaded.append(initial.named(source)))  # it may have to be downloaded, which one does
    config, weights = loaded[0] if loaded else initial.named(source)
    fitted: list[Example] = []
    if questions:
        examples.check_model(config)
        fitted = examples.fitted(questions, config.block_size)
    model = GPT(config).to(ranks.device).eval()
    state.load_model(model, weights.items())
    result = Result(Path(source).name if Path(source).exists() else source, config.parameters)
    if fitted:
        report = _progress(result.model, len(fitted), ranks) if ranks.is_first else _silent
        score = hellaswag.score(model, fitted, precision, rank=ranks.rank, world_size=ranks.world_size, report=report)
        result = dataclasses.replace(
            result,
            hellaswag_acc=score.acc,
            hellaswag_acc_norm=score.acc_norm,
            hellaswag_examples=score.examples,
        )
    if arguments.val is not None:
        loss, tokens = _validated(model, config, arguments, ranks, precision)
        result = dataclasses.replace(result, val_loss=loss, val_perplexity=math.exp(loss), val_tokens=tokens)
    return dataclasses.replace(result, seconds=round(time.monotonic() - began, 3))


def _validated(
    model: GPT, config: ModelConfig, arguments: argparse.Namespace, ranks: Ranks, precision: Precision
) -> tuple[float, int]:
    """Loss in nats over the validation split, and the tokens that it is over."""
    from gpt2hpc.data.store import open_store
    from gpt2hpc.training.validation import validation_loss

    found: manifest.Manifest = ranks.first_works(lambda: catalog.load(arguments.val))
    if found.vocab_size > config.vocab_size:
        raise DataError(
            f"--val={arguments.val} has tokens up to {found.vocab_size - 1}, and the model knows {config.vocab_size}; "
            "give data of its own tokenizer"
        )
    part = loader.Slice(ranks.rank, ranks.world_size, arguments.batch_size, 1)
    fetches = ranks.env.local_rank == 0
    store = open_store(found, DataConfig(dir=arguments.val), os.environ, job=ranks.env.job, fetches=fetches)
    tokens = arguments.val_tokens or found.tokens("val")
    try:
        windows = loader.ValLoader(found, store, block_size=config.block_size, tokens=tokens, part=part)
        result = validation_loss(model, windows, precision)
    finally:
        store.close()
    ranks.barrier()  # before what others may still read is removed
    store.remove()
    return result


def _progress(name: str, total: int, ranks: Ranks) -> Callable[[int], None]:
    """Writes to standard error: a line that is written over on a terminal, now and then one in a log."""
    began = said = time.monotonic()
    live = sys.stderr.isatty() and "SLURM_STEP_ID" not in os.environ  # srun's terminals end in files

    def report(done: int) -> None:
        nonlocal said
        now, about = time.monotonic(), min(total, done * ranks.world_size)
        left = cli.duration((now - began) * (total - about) / max(1, about))
        line = f"{name}: HellaSwag {about:,} of {total:,}, {about / max(now - began, 1e-9):,.1f} examples/s, ETA {left}"
        if live:
            sys.stderr.write(f"\r\x1b[K{line}" + ("\r\x1b[K" if about == total else ""))
            sys.stderr.flush()
        elif now - said >= LINE_EVERY_S:
            said = now
            print(line, file=sys.stderr, flush=True)

    return report


def _silent(done: int) -> None:
    """What ranks other than 0 report."""


if __name__ == "__main__":
    sys.exit(cli.run(main))
