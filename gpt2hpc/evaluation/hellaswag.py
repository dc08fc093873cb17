"""HellaSwag: which of four endings does the model find likeliest?

A row holds the context once and its four endings after it. Each ending sees the context and itself (a block mask), at the
positions that it would have alone. So the context is computed once, and the head sees only the places that predict an ending.

`acc` takes the ending with the least summed loss, `acc_norm` the one with the least loss a token, as build-nanogpt and GPT-3's
paper do. Batches depend on the examples alone, so any number of ranks counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gpt2hpc.evaluation.examples import ENDINGS, Example
from gpt2hpc.model.gpt import GPT
from gpt2hpc.training.precision import Precision

BATCH_TOKENS = 8192
"""Of a batch, with its padding."""


@dataclass(frozen=True)
class Score:
    """How many examples were answered rightly: by the summed loss, and by the loss a token."""

    examples: int
    right: int
    right_norm: int

    @property
    def acc(self) -> float:
        return self.right / self.examples

    @property
    def acc_norm(self) -> float:
        return self.right_norm / self.examples


def batches(examples: Sequence[Example]) -> list[list[int]]:
    """Numbers of the examples, the longest rows first, so that rows of a batch are of like length."""
    result: list[list[int]] = []
    for number in sorted(range(len(examples)), key=lambda number: (-examples[number].row_length, number)):
        if not result or (len(result[-1]) + 1) * examples[result[-1][0]].row_length > BATCH_TOKENS:
            result.append([])
        result[-1].append(number)
    return result


@torch.no_grad()
def score(
    model: GPT,
    examples: Sequence[Example],
    precision: Precision,
    *,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[int], None] = lambda done: None,
) -> Score:
    """Every rank calls it, with all the examples, and gets the counts over all; one reduction, at the end.

    `report` is told after each batch how many examples this rank has done.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in batches(examples)[rank::world_size]:
        chosen = [examples[number] for number in batch]
        labels = torch.tensor([example.label for example in chosen])
        answers = choices(model, chosen, precision)
        counts += torch.stack([torch.tensor(len(chosen)), *(answers == labels[:, None]).sum(dim=0)])
        report(int(counts[0]))
    if world_size > 1:
        dist.all_reduce(counts)
    model.train(was_training)
    return Score(*counts.tolist())


def choices(model: GPT, examples: Sequence[Example], precision: Precision) -> Tensor:
    """The ending that the model takes for each example, shaped (examples, 2): by the summed loss, and by the loss a token."""
    losses, lengths = losses_of(model, examples, precision)
    return torch.stack([losses.argmin(dim=1), (losses / lengths).argmin(dim=1)], dim=1)


def losses_of(model: GPT, examples: Sequence[Example], precision: Precision) -> tuple[Tensor, Tensor]:
    """Summed loss in nats of each ending, and its number of tokens; both shaped (examples, 4), float64, on the CPU."""
    rows = [_row(example) for example in examples]
    tokens, positions, segments = (
        pad_sequence([row[part] for row in rows], batch_first=True).to(precision.device) for part in range(3)
    )
    length = tokens.shape[1]
    own = segments[:, :, None] == segments[:, None, :]
    before = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    mask = ((segments[:, None, :] == 0) | own) & before  # padding is last, and looks at the context
    with precision.autocast():
        hidden = model.hidden(tokens, positions, mask[:, None])
        predicting = torch.cat([row[3] + number * length for number, row in enumerate(rows)]).to(precision.device)
        logits = model.head(hidden.flatten(0, 1)[predicting])
    targets = torch.tensor([token for each in examples for ending in each.endings for token in ending])
    losses = F.cross_entropy(logits.float(), targets.to(precision.device), reduction="none").double().cpu()
    lengths = torch.tensor([len(ending) for each in examples for ending in each.endings])
    ending_of = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, ending_of, losses)
    return sums.view(-1, ENDINGS), lengths.double().view(-1, ENDINGS)


def _row(example: Example) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, their positions, their segment (0 the context, then 1 to 4), and where the tokens of endings are predicted."""
    tokens, positions = list(example.context), list(range(len(example.context)))
    segments, predicting = [0] * len(tokens), []
    last = len(tokens) - 1
    for number, ending in enumerate(example.endings, start=1):
        start = len(tokens)
        predicting += [last, *range(start, start + len(ending) - 1)]
        tokens += ending
        positions += range(last + 1, last + 1 + len(ending))
        segments += [number] * len(ending)
    return torch.tensor(tokens), torch.tensor(positions), torch.tensor(segments), torch.tensor(predicting)
