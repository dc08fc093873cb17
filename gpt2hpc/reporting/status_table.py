"""Status as text: a row a run with what there is to say below it, or one run as a block."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from gpt2hpc import cli
from gpt2hpc.data.survey import Survey
from gpt2hpc.reporting.run_state import WAITS
from gpt2hpc.reporting.run_status import RunStatus

HEADER = f"{'STATE':10} {'STEP':>7}/{'OF':<7} {'':4} {'LOSS':>7} {'VAL':>7} {'TOK/S':>7} {'MFU':>5} {'ETA':>8} {'RESTARTS':>8}"
INDENT = 4


def table(rows: Sequence[RunStatus | Survey], width: int | None) -> str:
    """All rows below a header; what is told of each is wrapped to `width` columns, None for no wrapping."""
    if not rows:
        return "no runs"
    names = max(3, *(len(_name(row)) for row in rows))
    lines = [f"{'RUN':{names}} {HEADER}"]
    for row in rows:
        lines.append(f"{_name(row):{names}} {_row(row) if isinstance(row, RunStatus) else _data_row(row)}".rstrip())
        told = _told(row) if isinstance(row, RunStatus) else _data_told(row)
        lines += [line for each in told for line in _wrapped(each, width)]
    return "\n".join(lines)


def block(run: RunStatus, width: int | None) -> str:
    """One run, a line for each thing that is to be told of it."""
    return "\n".join(
        [
            f"{run.run}: {run.state}",
            *(
                line
                for name, text in _facts(run).items()
                if text
                for line in _wrapped(f"{name:11} {text}", width, indent=2, hanging=14)
            ),
        ]
    )


def _name(row: RunStatus | Survey) -> str:
    return row.run if isinstance(row, RunStatus) else row.data


def _row(run: RunStatus) -> str:
    share = f"{min(1.0, run.step / run.steps):4.0%}" if run.steps else "   ?"
    mfu = "-" if run.mfu is None else f"{run.mfu:.1%}"
    return (
        f"{run.state:10} {run.step:>7}/{run.steps or '?':<7} {share} {number(run.loss)} {number(run.val_loss)} "
        f"{rate(run.tokens_per_s):>7} {mfu:>5} {span(run.eta_s):>8} {sum(run.restarts.values()):>8}"
    )


def _told(run: RunStatus) -> list[str]:
    """What does not fit a column."""
    facts = _facts(run)
    told = [facts["detail"]]
    if run.state in WAITS and run.expected_start:
        told.append(f"Slurm expects it to start at {run.expected_start}")
    if run.jobs_needed and run.state != "finished":
        told.append(f"finish {facts['finish']}")
    if run.restarts:
        told.append(f"restarts {restarts(run.restarts)}")
    told += [f"{name} {facts[name]}" for name in ("nodes", "uploads") if facts[name]]
    if run.next and run.state not in ("running", "finished"):
        told.append(f"next: {run.next}")
    return list(filter(None, told))


def _facts(run: RunStatus) -> dict[str, str]:
    val = "" if run.val_loss is None else f", validation {run.val_loss:.4f}"
    mfu = "" if run.mfu is None else f", mfu {run.mfu:.1%}"
    share = f", {min(1.0, run.step / run.steps):.1%}" if run.steps else ""
    left = f"{span(run.left_s)} of {span(run.limit_s)} left" if run.left_s is not None and run.limit_s else ""
    saved = "" if run.checkpoint_step is None else f"step {run.checkpoint_step}, {span(run.checkpoint_age_s)} ago"
    return {
        "detail": run.detail,
        "progress": f"step {run.step}/{run.steps or '?'}{share}",
        "loss": "" if run.loss is None else f"{run.loss:.4f}{val}",
        "speed": "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f} tok/s{mfu}",
        "finish": _finish(run),
        "start": f"expected at {run.expected_start}" if run.expected_start else "",
        "time": left,
        "restarts": restarts(run.restarts),
        "nodes": _nodes(run),
        "checkpoint": saved,
        "uploads": run.uploads.line if run.uploads else "",
        "next": run.next or "",
    }


def _finish(run: RunStatus) -> str:
    if run.eta_s is None or run.state == "finished":
        return ""
    told = f"in {span(run.eta_s)} of running"
    if not run.jobs_needed:
        return told
    more = "more " if run.state == "running" else ""
    each = f" of {span(run.limit_s)}" if run.limit_s else ""
    return f"{told}, with {run.jobs_needed} {more}{'job' if run.jobs_needed == 1 else 'jobs'}{each}"


def _nodes(run: RunStatus) -> str:
    named = {"excluded": run.excluded, "suspect": run.suspects}
    return "; ".join(f"{what}: {', '.join(nodes)}" for what, nodes in named.items() if nodes)


def restarts(causes: Mapping[str, int]) -> str:
    """`3: 2 preempted, 1 crashed`; empty for none."""
    ordered = sorted(causes.items(), key=lambda item: -item[1])
    return f"{sum(causes.values())}: {', '.join(f'{count} {cause}' for cause, count in ordered)}" if causes else ""


def number(value: float | None) -> str:
    return "      -" if value is None else f"{value:7.4f}"


def rate(tokens_per_s: float | None) -> str:
    """`412k`, `1.24M`."""
    if tokens_per_s is None:
        return "-"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if tokens_per_s >= size:
            return (
                f"{tokens_per_s / size:.3g}{unit}" if tokens_per_s < 999 * size else f"{tokens_per_s / size:.0f}{unit}"
            )
    return f"{tokens_per_s:.0f}"


def span(seconds: float | None) -> str:
    """`2:03`, `1:02:03`, `3d 04h` from two days on; `-` where unknown."""
    if seconds is None:
        return "-"
    if seconds >= 48 * 3600:
        days, rest = divmod(round(seconds), 86_400)
        return f"{days}d {rest // 3600:02}h"
    return cli.duration(seconds)


def _data_row(found: Survey) -> str:
    progress = f"{found.units_done:>7}/{found.units:<7} {found.units_done / max(1, found.units):4.0%}"
    rate_ = "-" if found.tokens_per_s is None else rate(found.tokens_per_s)
    return f"{found.state:10} {progress} {'-':>7} {'-':>7} {rate_:>7} {'-':>5} {span(found.eta_s):>8} {'-':>8}"


def _data_told(found: Survey) -> list[str]:
    told = [f"units; {found.tokens / 1e6:,.1f} Mtok"]
    if found.tokens_per_s is not None:
        told.append(f"{found.tokens_per_s / 1e6:,.2f} Mtok/s")
    if found.eta_s is not None:
        told.append(f"ETA {cli.duration(found.eta_s)}")
    if found.state == "unfinished" and found.last_unit_s_ago is not None:
        told.append(f"the last unit was done {cli.duration(found.last_unit_s_ago)} ago")
    return [", ".join(told)]


def _wrapped(text: str, width: int | None, *, indent: int = INDENT, hanging: int = INDENT) -> Iterable[str]:
    if width is None:
        return [" " * indent + text]
    return textwrap.wrap(
        text,
        max(40, width),
        initial_indent=" " * indent,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
