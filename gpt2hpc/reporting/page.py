"""The report: one HTML file that needs nothing else, from the facts of one or several runs."""

from __future__ import annotations

import importlib.resources
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gpt2hpc import __version__, cli
from gpt2hpc.cluster.ledger import Attempt
from gpt2hpc.evaluation.baselines import BASELINES
from gpt2hpc.reporting import charts
from gpt2hpc.reporting.facts import RunFacts, Start
from gpt2hpc.reporting.markup import Html, details, document, joined, json_block, share, table, tag

NONE = "–"


def render(runs: Sequence[RunFacts], states: Sequence[str], *, made: str) -> str:
    """The page; `states` says of each run what became of it, `made` when this was."""
    data = charts.page_data(runs)
    single = len(runs) == 1
    title = runs[0].name if single else f"{len(runs)} runs of gpt2hpc"
    facts = [_summary(run, state) for run, state in zip(runs, states, strict=True)]
    parts = [
        tag("h1", title),
        tag("p", f"Report of {made} by gpt2hpc {__version__}. ", *_left_out(runs), of="soft"),
        _tiles(facts[0]) if single else tag("div", _compared(facts), of="card"),
        tag("h2", "Curves"),
        _charts(data),
        _evaluation(runs),
        *_of_each(runs, "Attempts", _attempts, named=not single),
        tag("h2", "Cost and lost work"),
        tag("div", *(_cost(run, named=not single) for run in runs), of="card"),
        *_of_each([run for run in runs if run.samples], "Samples", _samples, named=not single),
        tag("h2", "Nodes"),
        _nodes(runs),
        tag("h2", "Configuration"),
        tag("div", _differences(runs), *(_config(run, named=not single) for run in runs), of="card"),
        tag("h2", "Versions"),
        _versions(runs),
    ]
    main = tag("main", joined(parts), of="" if single else "several")
    body = joined([main, json_block("data", data)])
    return document(title, style=_asset("report.css"), script=_asset("report.js"), body=body)


def _asset(name: str) -> str:
    return importlib.resources.files("gpt2hpc.reporting").joinpath(name).read_text(encoding="utf-8")


def _left_out(runs: Sequence[RunFacts]) -> list[object]:
    """What was left out of the curves, if anything."""
    told = [remark + ". " for remark in (run.curves.remarks for run in runs) if remark]
    if any(len(series) > charts.MAX_POINTS for run in runs for series in run.curves.series.values()):
        told.append(
            f"Curves of more than {charts.MAX_POINTS:,} points are drawn by the least and the largest value of short stretches."
        )
    return list(told)


def _summary(run: RunFacts, state: str) -> dict[str, str]:
    """The facts in a line."""
    tokens = run.config.get("train.tokens_per_step")
    return {
        "run": run.name,
        "state": state.replace("_", " "),
        "step": f"{run.step:,}",
        "tokens": _short(run.step * tokens) if isinstance(tokens, int) else NONE,
        "train loss": _last(run, "train", "{:.4f}"),
        "val loss": _last(run, "val", "{:.4f}"),
        "HellaSwag": _last(run, "hella", "{:.4f}"),
        "tokens/s": _median(run, "tokens_per_s", "{:,.0f}"),
        "MFU": _median(run, "mfu", "{:.1%}"),
        "restarts": str(len(run.restarts)),
        run.hour_unit: f"{run.rank_hours:,.2f}",
        "steps repeated": ("≥ " if run.unknown_ends else "") + f"{run.repeated:,}",
    }


def _tiles(facts: dict[str, str]) -> Html:
    shown = [(name, value) for name, value in facts.items() if name != "run" and value != NONE]
    return tag("div", *(tag("div", tag("span", name), tag("b", value), of="tile") for name, value in shown), of="tiles")


def _compared(facts: Sequence[dict[str, str]]) -> Html:
    every = dict.fromkeys(name for each in facts for name in each)
    names = [name for name in every if any(each.get(name, NONE) != NONE for each in facts)]
    heads = [name if name in ("run", "state") else f"#{name}" for name in names]
    return table(heads, [[each.get(name, NONE) for name in names] for each in facts])


def _charts(data: dict[str, Any]) -> Html:
    drawn = data["charts"]
    if not drawn:
        return tag("p", "Nothing is logged yet.", of="soft")
    cards = [
        Html(
            f'<section class="card{" wide" if chart["key"] == "loss" else ""}" id="chart-{chart["key"]}">'
            f"{tag('h3', chart['title'], tag('span', chart['unit'], of='unit-of'))}</section>"
        )
        for chart in drawn
    ]
    missing = (
        []
        if any(chart["key"] == "mfu" for chart in drawn)
        else [tag("p", "No MFU: the peak rate of this device is not known.", of="soft")]
    )
    return joined(
        [
            Html("<noscript><p>The charts need JavaScript. Their values are in RUN/metrics.jsonl.</p></noscript>"),
            Html(
                '<div class="bar-of-tools"><label>Smooth the training loss '
                f'<select id="smooth"><option value="1">not</option>{_smoothings()}</select></label>'
                '<label><input type="checkbox" id="log-x"> steps logarithmic</label>'
                '<label><input type="checkbox" id="log-y"> losses and norms logarithmic</label>'
                '<button type="button" id="reset" disabled>Whole run</button>'
                '<span class="soft">Drag over steps to zoom in all charts; double click shows the whole run.</span></div>'
            ),
            tag("div", *cards, of="charts"),
            *missing,
        ]
    )


def _smoothings() -> str:
    return "".join(f'<option value="{count}">mean of {count}</option>' for count in (5, 20, 100, 500))


def _evaluation(runs: Sequence[RunFacts]) -> Html:
    """HellaSwag beside published models, the best first."""
    measured = [run for run in runs if run.curves.of("hella")]
    if not measured:
        return joined(
            [
                tag("h2", "Evaluation"),
                tag(
                    "p",
                    "HellaSwag was not measured in this run."
                    if len(runs) == 1
                    else "HellaSwag was not measured in these runs.",
                    of="soft",
                ),
            ]
        )
    rows: list[tuple[float, bool, list[object]]] = []
    for run in measured:
        step, value = run.curves.of("hella")[-1]
        accuracy = _last(run, "hella_acc", "{:.4f}")
        rows.append(
            (value, True, [f"{run.name}, step {step:,}", NONE, accuracy, f"{value:.4f}", share(value), "this report"])
        )
    for each in BASELINES:
        accuracy = NONE if each.acc is None else f"{each.acc:.4f}"
        cells = [
            each.model,
            f"{each.parameters_millions:,}M",
            accuracy,
            f"{each.acc_norm:.4f}",
            share(each.acc_norm),
            each.source,
        ]
        rows.append((each.acc_norm, False, list(cells)))
    rows.sort(key=lambda row: -row[0])
    head = ["model", "#parameters", "#acc", "#acc_norm", "", "source"]
    shown = table(head, [cells for _, _, cells in rows], own=[mine for _, mine, _ in rows])
    return joined([tag("h2", "Evaluation: HellaSwag, zero-shot"), tag("div", shown, of="card")])


def _of_each(runs: Sequence[RunFacts], title: str, make: Callable[[RunFacts], Html], *, named: bool) -> list[Html]:
    """A section with a card for each run; nothing where there is none."""
    if not runs:
        return []
    cards = [tag("div", tag("h3", run.name) if named else "", make(run), of="card") for run in runs]
    return [tag("h2", title), *cards]


def _attempts(run: RunFacts) -> Html:
    if not run.starts:
        return tag("p", "No attempt is in the ledger.", of="soft")
    head = [
        "#no.",
        "job",
        "nodes",
        "#ranks",
        "started (UTC)",
        "#lasted",
        "#start-up",
        "#from step",
        "#to step",
        "ended",
        "#computed again",
    ]
    return table(head, [_attempt(start) for start in run.starts])


def _attempt(start: Start) -> list[object]:
    attempt = start.attempt
    lasted = NONE if start.seconds is None else cli.duration(start.seconds)
    job = attempt.job + (f" (restart {attempt.restart})" if attempt.restart else "")
    code = f", exit code {attempt.exit_code}" if attempt.exit_code else ""
    ended = start.assumed if start.assumed == "still running" else f"{start.cause}{code}"
    return [
        attempt.number,
        job,
        attempt.nodes,
        attempt.world_size,
        attempt.started.removesuffix("Z").replace("T", " "),
        lasted + (" *" if start.assumed else ""),
        _start_up(attempt),
        f"{start.resumed:,}",
        "?" if start.reached is None else f"{start.reached:,}",
        ended,
        "?" if start.repeated is None else f"{start.repeated:,}",
    ]


def _start_up(attempt: Attempt) -> str:
    """Until its first step was done, and how it found the compiler's cache."""
    if attempt.start_up_s is None:
        return NONE
    cache = f", {attempt.compile_cache} cache" if attempt.compile_cache else ""
    return f"{attempt.start_up_s:,.0f} s{cache}"


def _cost(run: RunFacts, *, named: bool) -> Html:
    told = [f"{run.rank_hours:,.3f} {run.hour_unit}: each attempt's time from its start to its end, times its ranks."]
    if run.hour_unit != "GPU-hours":
        told.append("A rank is a process, not a GPU.")
    else:
        told.append("One GPU a rank; waiting in the queue is not in it.")
    if assumed := sorted({start.assumed for start in run.starts if start.assumed}):
        told.append(f"Where an attempt (*) did not write its end, it is taken as {' or '.join(assumed)}.")
    if run.unclaimed:
        told.append(f"{cli.plural(run.unclaimed, 'start')} ended before training began, and are not counted.")
    least = "At least " if run.unknown_ends else ""
    lost = (
        f"{least}{cli.plural(run.repeated, 'step')} of {run.step + run.repeated:,} were computed again after a restart"
    )
    lost += f" ({run.repeated / max(1, run.step + run.repeated):.1%})."
    if run.unknown_ends:
        lost += f" {cli.plural(run.unknown_ends, 'attempt')} left no word of how far beyond its last save it had got."
    return joined([tag("h3", run.name) if named else "", tag("p", " ".join(told)), tag("p", lost)])


def _samples(run: RunFacts) -> Html:
    """Closed but the last, which is the best."""
    parts = [
        details(name, tag("pre", text, of="text"), is_open=index == len(run.samples) - 1)
        for index, (name, text) in enumerate(run.samples)
    ]
    if run.sample_files > len(run.samples):
        parts.insert(0, tag("p", f"{len(run.samples)} of {run.sample_files} files of samples.", of="soft"))
    return joined(parts)


def _nodes(runs: Sequence[RunFacts]) -> Html:
    rows = [[run.name, node, count] for run in runs for node, count in sorted(run.nodes.items())]
    head = ["run", "node", "#attempts"]
    if len(runs) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return tag("div", table(head, rows) if rows else "No attempt is in the ledger.", of="card")


def _differences(runs: Sequence[RunFacts]) -> Html:
    """The settings in which several runs differ."""
    if len(runs) == 1:
        return Html()
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [
        [key, *(run.config.get(key, NONE) for run in runs)]
        for key in keys
        if len({str(run.config.get(key)) for run in runs}) > 1
    ]
    if not rows:
        return tag("p", "The settings are the same.")
    return table(["setting", *(run.name for run in runs)], rows)


def _config(run: RunFacts, *, named: bool) -> Html:
    if not run.config_text:
        return tag("p", f"{run.name} has no config.yaml.", of="soft")
    return details(f"config.yaml of {run.name}" if named else "config.yaml", tag("pre", run.config_text))


def _versions(runs: Sequence[RunFacts]) -> Html:
    keys = list(dict.fromkeys(key for run in runs for key in run.versions))
    if not keys:
        return tag("div", "No checkpoint is there to tell.", of="card")
    rows = [[key, *(run.versions.get(key, NONE) for run in runs)] for key in keys]
    return tag("div", table(["as the newest checkpoint has it", *(run.name for run in runs)], rows), of="card")


def _last(run: RunFacts, kind: str, form: str) -> str:
    series = run.curves.of(kind)
    return form.format(series[-1][1]) if series else NONE


def _median(run: RunFacts, kind: str, form: str) -> str:
    values = [value for _, value in run.curves.of(kind)]
    return form.format(statistics.median(values)) if values else NONE


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:,.2f}{letter}"
    return str(count)
