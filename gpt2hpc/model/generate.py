"""Text from a model, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from gpt2hpc.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` new tokens after `prompt` (not empty), ending before the token `stop`.

    Temperature 0 takes the likeliest token. The context is the last `block_size` tokens.
    """
    device = model.wte.weight.device
    source = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    model.eval()
    for _ in range(max_tokens):
        context = torch.tensor([tokens[-model.config.block_size :]], device=device)
        logits = model(context)[0, -1, : model.config.vocab_size].float().cpu()  # padding shall not change the draw
        token = int(logits.argmax()) if temperature == 0 else _draw(logits / temperature, top_k, source)
        if token == stop:
            return
        tokens.append(token)
        yield token


def _draw(logits: torch.Tensor, top_k: int | None, source: torch.Generator) -> int:
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(F.softmax(logits, dim=-1), 1, generator=source))
