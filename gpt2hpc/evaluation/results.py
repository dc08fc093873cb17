"""What an evaluation has measured, as a record and as a table beside published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2hpc.evaluation.baselines import BASELINES

ALL_EXAMPLES = 10_042
"""Of HellaSwag's validation split."""


@dataclass(frozen=True)
class Result:
    """What was measured of one model; None of what was not asked for. Losses in nats a token."""

    model: str
    parameters: int
    hellaswag_acc: float | None = None
    hellaswag_acc_norm: float | None = None
    hellaswag_examples: int | None = None
    val_loss: float | None = None
    val_perplexity: float | None = None
    val_tokens: int | None = None
    seconds: float = 0.0


def table(results: Sequence[Result]) -> list[str]:
    """Lines for people: each model, and the published numbers."""
    lines = []
    for result in results:
        lines.append(f"{result.model}  ({result.parameters / 1e6:,.1f}M parameters, {result.seconds:,.1f} s)")
        if result.hellaswag_acc_norm is not None and result.hellaswag_acc is not None:
            lines.append(
                f"  HellaSwag   acc_norm {result.hellaswag_acc_norm:7.2%}   acc {result.hellaswag_acc:7.2%}   "
                f"of {result.hellaswag_examples:,} examples"
            )
        if result.val_loss is not None:
            lines.append(
                f"  validation  loss {result.val_loss:.4f}   perplexity {result.val_perplexity:,.2f}   "
                f"over {result.val_tokens:,} tokens"
            )
    if any(result.hellaswag_examples for result in results):
        lines += ["", f"Published, of {ALL_EXAMPLES:,} examples:"]
        for each in BASELINES:
            acc = "      " if each.acc is None else f"{each.acc:6.2%}"
            lines.append(f"  {each.model:13} acc_norm {each.acc_norm:6.2%}   acc {acc}   {each.source}")
    return lines
