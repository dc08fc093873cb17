"""The charts of a report as data: what the page's script draws, with few enough points that a browser stays quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpt2hpc.evaluation.baselines import BASELINES
from gpt2hpc.reporting.curves import KINDS, Series
from gpt2hpc.reporting.facts import RunFacts

MAX_POINTS = 3000
COLORS = 8
"""How many colors the style has; more runs begin anew."""


@dataclass(frozen=True)
class Chart:
    """What to draw over the steps: `kinds` of curves, with their unit, from zero up or in the range of the values."""

    key: str
    title: str
    kinds: tuple[str, ...]
    unit: str
    from_zero: bool = False
    log_y: bool = False
    percent: bool = False
    levels: bool = False


CHARTS = (
    Chart("loss", "Loss", ("train", "val"), "nats a token", log_y=True),
    Chart("hella", "HellaSwag beside published models", ("hella",), "acc_norm, zero-shot", levels=True),
    Chart("rate", "Throughput", ("tokens_per_s",), "tokens/s of all ranks", from_zero=True),
    Chart("mfu", "Model FLOPs utilization", ("mfu",), "share of the peak rate", from_zero=True, percent=True),
    Chart("lr", "Learning rate", ("lr",), "a step", from_zero=True),
    Chart("norm", "Gradient norm", ("grad_norm",), "before clipping", log_y=True),
)


def page_data(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """The charts that have values, and the restarts of each run, as JSON takes them."""
    drawn = [_chart(chart, runs) for chart in CHARTS]
    restarts = [
        {"run": number, "name": run.name, "step": each.step, "attempt": each.number, "cause": each.cause}
        for number, run in enumerate(runs)
        for each in run.restarts
    ]
    return {
        "runs": [run.name for run in runs],
        "charts": [each for each in drawn if each["lines"]],
        "restarts": restarts,
    }


def thinned(series: Series, most: int = MAX_POINTS) -> Series:
    """At most about that many points: of each stretch of steps the least and the largest value, so no spike is lost."""
    if len(series) <= most:
        return series
    kept = [series[0]]
    for stretch in _stretches(series[1:-1], _width(series, most)):
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return [*kept, series[-1]]


def means(series: Series, most: int = MAX_POINTS) -> tuple[int, Series]:
    """How many values a stretch has, and the mean of each at its last step: what a smooth curve is made of."""
    width = 1 if len(series) <= most else _width(series, most)
    return width, [
        (stretch[-1][0], sum(value for _, value in stretch) / len(stretch)) for stretch in _stretches(series, width)
    ]


def _width(series: Series, most: int) -> int:
    return -(-2 * len(series) // most)


def _stretches(series: Series, width: int) -> list[Series]:
    return [series[begin : begin + width] for begin in range(0, len(series), width)]


def _chart(chart: Chart, runs: Sequence[RunFacts]) -> dict[str, Any]:
    lines = [
        {
            "name": _line_name(chart, kind, run.name if len(runs) > 1 else None),
            "color": (number if len(runs) > 1 else order) % COLORS,
            "kind": kind,
            "points": _rounded(thinned(run.curves.of(kind))),
            **_smooth(kind, run.curves.of(kind)),
        }
        for number, run in enumerate(runs)
        for order, kind in enumerate(chart.kinds)
        if run.curves.of(kind)
    ]
    levels = [{"name": each.model, "value": each.acc_norm} for each in BASELINES] if chart.levels else []
    return {
        "key": chart.key,
        "unit": chart.unit,
        "title": chart.title,
        "fromZero": chart.from_zero,
        "logY": chart.log_y,
        "percent": chart.percent,
        "lines": lines,
        "levels": levels,
    }


def _smooth(kind: str, series: Series) -> dict[str, Any]:
    """What a smooth curve is made of, where that is not the points themselves."""
    if kind != "train" or len(series) <= MAX_POINTS:
        return {}
    width, averaged = means(series)
    return {"width": width, "means": _rounded(averaged)}


def _rounded(series: Series) -> list[tuple[int, float]]:
    return [(step, float(f"{value:.6g}")) for step, value in series]


def _line_name(chart: Chart, kind: str, run: str | None) -> str:
    what = KINDS.get(kind, chart.title)
    if run is None:
        return what
    return f"{run}, {what}" if len(chart.kinds) > 1 else run
