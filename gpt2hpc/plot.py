"""`gpt2hpc plot`: loss curves of one or many runs as an image."""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2hpc import cli, durable
from gpt2hpc.errors import DataError, MissingError, UsageError
from gpt2hpc.evaluation.baselines import BASELINES
from gpt2hpc.reporting import curves
from gpt2hpc.reporting.curves import KINDS, Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg", "pdf")
COLORS = ("#2a6fdb", "#d9602b", "#1a9a76", "#a04fc4", "#b8860b", "#d03a6a", "#4a8f2c", "#5b6470")
DAMPED = 0.3
"""Opacity of the values behind their mean."""


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="gpt2hpc plot", description="Draw the loss curves of one or many runs.")
    parser.add_argument(
        "logs",
        nargs="+",
        type=Path,
        metavar="LOG",
        help="a run directory, a log.txt (`step kind value`) or metrics.jsonl",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"written as {', '.join(FORMATS)} by suffix"
    )
    parser.add_argument("--x-scale", choices=("linear", "log"), default="linear", help="of the steps (default: linear)")
    parser.add_argument(
        "--y-scale", choices=("linear", "log"), default="linear", help="of the losses (default: linear)"
    )
    parser.add_argument(
        "--smooth", type=int, default=1, metavar="N", help="training losses as the mean of the last N (default: 1)"
    )
    parser.add_argument(
        "--kinds", default=",".join(KINDS), metavar="KIND,…", help=f"what to draw (default: {','.join(KINDS)})"
    )
    parser.add_argument("--title", default="", help="above the curves")
    cli.add_examples(
        parser,
        "gpt2hpc plot runs/mine --out loss.png",
        "gpt2hpc plot runs/a runs/b --out losses.svg --y-scale log --smooth 20",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    kinds = _kinds(arguments.kinds)
    suffix = arguments.out.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise UsageError(f"--out={arguments.out} has no known suffix; end it in .{', .'.join(FORMATS)}")
    cli.check_out(arguments.out, example="loss.png")
    if arguments.smooth < 1:
        raise UsageError(f"--smooth={arguments.smooth} must be 1 or more")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError("matplotlib is not installed, and this command needs it: pip install 'gpt2hpc[plot]'")
    found = curves.read_all(arguments.logs)
    for each in found:
        if each.remarks:
            cli.warn(each.remarks)
    if not any(each.of(kind) for each in found for kind in kinds):
        raise DataError(f"--kinds={arguments.kinds}: no such values in {', '.join(str(each.path) for each in found)}")
    image = draw(
        found,
        kinds,
        image_format=suffix,
        x_scale=arguments.x_scale,
        y_scale=arguments.y_scale,
        smooth=arguments.smooth,
        title=arguments.title,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    durable.publish_bytes(arguments.out, image)
    cli.say(f"{arguments.out}: {_told(found, kinds)}")
    return 0


def draw(
    found: Sequence[Curves],
    kinds: Sequence[str],
    *,
    image_format: str,
    x_scale: str = "linear",
    y_scale: str = "linear",
    smooth: int = 1,
    title: str = "",
) -> bytes:
    """The image: losses and, where there is any, HellaSwag beside them. The same logs give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no window system is asked for

    parts = [
        part
        for part in ([kind for kind in kinds if kind != "hella"], [kind for kind in kinds if kind == "hella"])
        if any(each.of(kind) for each in found for kind in part)
    ]
    with matplotlib.rc_context({"svg.hashsalt": "gpt2hpc", "font.size": 10}):
        figure = Figure(figsize=(7.5 * len(parts), 4.8), layout="constrained")
        for number, part in enumerate(parts, start=1):
            axes = figure.add_subplot(1, len(parts), number)
            is_loss = part != ["hella"]
            _draw_part(axes, found, part, smooth=smooth)
            if not is_loss:
                _draw_baselines(axes)
            _finish(axes, x_scale=x_scale, y_scale=y_scale if is_loss else "linear")
            axes.set_xlim(*_steps(found, kinds))
            axes.set_ylabel("loss, nats a token" if is_loss else KINDS["hella"])
        if title:
            figure.suptitle(_plain(title))
        image = io.BytesIO()
        metadata: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[image_format]
        figure.savefig(image, format=image_format, dpi=150, metadata=metadata)
    return image.getvalue()


def _draw_part(axes: Axes, found: Sequence[Curves], kinds: Sequence[str], *, smooth: int) -> None:
    """One color a run; training thin, validation with points. A single run has a color a kind."""
    for number, each in enumerate(found):
        for order, kind in enumerate(kinds):
            series = each.of(kind)
            if not series:
                continue
            color = COLORS[(number if len(found) > 1 else order) % len(COLORS)]
            label = _plain(KINDS[kind] if len(found) == 1 else f"{each.name}, {KINDS[kind]}")
            steps, values = zip(*series, strict=True)
            if kind != "train":
                axes.plot(steps, values, color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
            elif smooth > 1:
                axes.plot(steps, values, color=color, alpha=DAMPED, linewidth=0.8)
                mean = [value for _, value in curves.smoothed(series, smooth)]
                axes.plot(steps, mean, color=color, linewidth=1.2, label=f"{label}, mean of {smooth}")
            else:
                damped = DAMPED * 2 if len(found) > 1 else 1.0
                axes.plot(steps, values, color=color, alpha=damped, linewidth=1.0, label=label)


def _draw_baselines(axes: Axes) -> None:
    for baseline in BASELINES:
        axes.axhline(baseline.acc_norm, color="#8a8f98", linestyle="--", linewidth=0.8)
        axes.annotate(
            baseline.model,
            (1, baseline.acc_norm),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 2),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color="#5b6470",
        )


def _steps(found: Sequence[Curves], kinds: Sequence[str]) -> tuple[float, float]:
    """The first and the last step of all, with a margin: both parts show the same ones."""
    steps = [step for each in found for kind in kinds for step, _ in each.of(kind)]
    first, last = min(steps), max(*steps, min(steps) + 1)
    margin = 0.02 * (last - first)
    return first - margin, last + margin


def _finish(axes: Axes, *, x_scale: str, y_scale: str) -> None:
    if x_scale == "log":
        axes.set_xscale("symlog", linthresh=1)  # logarithmic from step 1 on, with room for step 0
    else:
        axes.set_xscale(x_scale)
    axes.set_yscale(y_scale)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.grid(visible=True, color="#d8dbe0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)


def _plain(text: str) -> str:
    """A name as it is: a dollar begins no formula, and a leading underscore hides no label."""
    return f" {text}".replace("$", r"\$")


def _kinds(text: str) -> list[str]:
    named = [word.strip() for word in text.split(",") if word.strip()]
    for word in named:
        if word not in KINDS:
            raise UsageError(f"--kinds={text}: {word} is unknown; the kinds are {', '.join(KINDS)}")
    if not named:
        raise UsageError(f"--kinds is empty; the kinds are {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in named]


def _told(found: Sequence[Curves], kinds: Sequence[str]) -> str:
    counts = {kind: sum(len(each.of(kind)) for each in found) for kind in kinds}
    points = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f"{points} points of {cli.plural(len(found), 'log')}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
