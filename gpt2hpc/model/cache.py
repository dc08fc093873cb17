"""What the blocks have read of growing texts: keys and values, so that one more token costs the work of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2hpc.config import ModelConfig


class Cache:
    """Keys and values of a batch of texts, each shaped (n_layer, batch, n_head, room, n_embd / n_head).

    Position p of a text is column p of its row, however long the others are. What a row holds after its text's end, as padding of a
    short prompt, is looked at by none: a mask leaves it out until the text, growing, writes over it.
    """

    def __init__(self, config: ModelConfig, *, batch: int, room: int, like: Tensor) -> None:
        shape = (config.n_layer, batch, config.n_head, room, config.n_embd // config.n_head)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.rows = torch.arange(batch, device=like.device)[:, None]

    def past(self, block: int, positions: Tensor) -> Past:
        """Of one block, for tokens at these positions, shaped (length) or (batch, length)."""
        return Past(self.keys[block], self.values[block], self.rows, positions)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the other rows."""
        chosen = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values, self.rows = self.keys[:, chosen], self.values[:, chosen], self.rows[: len(rows)]


@dataclass(frozen=True)
class Past:
    """What one block has read, shaped (batch, n_head, room, width of a head), and the rows and columns of what it reads now."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    positions: Tensor

    def extended(self, k: Tensor, v: Tensor, until: int) -> tuple[Tensor, Tensor]:
        """Write in `k` and `v`, shaped (batch, n_head, length, width of a head); all columns before `until`."""
        self.keys[self.rows, :, self.positions] = k.transpose(1, 2)
        self.values[self.rows, :, self.positions] = v.transpose(1, 2)
        return self.keys[:, :, :until], self.values[:, :, :until]
