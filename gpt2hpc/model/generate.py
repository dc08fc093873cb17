"""Text from a model, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2hpc.model.cache import Cache
from gpt2hpc.model.gpt import GPT


@dataclass(frozen=True)
class Choice:
    """How a token is chosen.

    Args:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose among the k likeliest.
        top_p: Of those, among the likeliest ones that reach this probability together (Holtzman et al. 2020, arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def draw(self, logits: Tensor, source: torch.Generator) -> int:
        """A token, by its number; logits are shaped (vocab_size)."""
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(self.probabilities(logits), 1, generator=source))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each token, in fp64; 0 where it may not be chosen."""
        logits = logits.double()
        logits = (logits - logits.max()) / self.temperature  # no temperature above 0 makes the likeliest infinite
        if self.top_k is not None and self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        found = F.softmax(logits, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, tokens = found.sort(descending=True)
            found[tokens[ordered.cumsum(-1) - ordered >= self.top_p]] = 0.0
        return found


def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` new tokens after `prompt`: `generate_batch` for one prompt."""
    choice = Choice(temperature, top_k, top_p)
    for found in generate_batch(model, [prompt], max_tokens=max_tokens, choice=choice, seeds=[seed], stop=stop):
        yield found[0]


@torch.no_grad()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    choice: Choice,
    seeds: Sequence[int],
    stop: int | None = None,
) -> Iterator[dict[int, int]]:
    """Yield the next token of each prompt that goes on, by the prompt's number, up to `max_tokens` times.

    A prompt (not empty) ends before the token `stop`. Each has a seed of its own, so that its text does not depend on the others.
    The context is the last `block_size` tokens.
    """
    model.eval()
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = {number: list(prompt) for number, prompt in enumerate(prompts)}
    reader = _Reader(model, max_tokens)
    for _ in range(max_tokens):
        logits = reader.next_logits(texts)
        found = {number: choice.draw(logits[number], sources[number]) for number in texts}
        found = {number: token for number, token in found.items() if token != stop}
        texts = {number: texts[number] for number in found}
        if not texts:
            return
        for number, token in found.items():
            texts[number].append(token)
        yield found


class _Reader:
    """Reads texts as they grow: of each the last token alone, by what the cache has of the others.

    A text longer than block_size is read anew for each token: as its context moves on, every token in it gets another position.
    """

    def __init__(self, model: GPT, max_tokens: int) -> None:
        self.model, self.max_tokens = model, max_tokens
        self.device, self.block_size = model.wte.weight.device, model.config.block_size
        self.cache: Cache | None = None
        self.rows: list[int] = []

    def next_logits(self, texts: Mapping[int, list[int]]) -> dict[int, Tensor]:
        """Of the token after each text, shaped (vocab_size), on the CPU; the texts are those of the last call or fewer."""
        short = {number: text for number, text in texts.items() if len(text) <= self.block_size}
        long = {number: text for number, text in texts.items() if number not in short}
        found: dict[int, Tensor] = {}
        vocabulary = slice(self.model.config.vocab_size)  # without padding, which shall not change the draw
        for some, read in ((short, self._next if self.cache else self._first), (long, self._anew)):
            if some:
                logits = self.model.head(read(some))[:, vocabulary].float().cpu()
                found |= zip(some, logits, strict=True)
        return found

    def _first(self, texts: Mapping[int, list[int]]) -> Tensor:
        """What the head sees at the end of each text, shaped (texts, n_embd)."""
        lengths = [len(text) for text in texts.values()]
        longest, self.rows = max(lengths), list(texts)
        room = min(self.block_size, longest + self.max_tokens)
        self.cache = Cache(self.model.config, batch=len(texts), room=room, like=self.model.wte.weight)
        padded = [text + [0] * (longest - len(text)) for text in texts.values()]
        hidden = self.model.hidden(torch.tensor(padded, device=self.device), cache=self.cache)
        return hidden[torch.arange(len(texts)), torch.tensor(lengths) - 1]

    def _next(self, texts: Mapping[int, list[int]]) -> Tensor:
        assert self.cache is not None
        if self.rows != list(texts):
            self.cache.keep([self.rows.index(number) for number in texts])
            self.rows = list(texts)
        tokens = torch.tensor([text[-1:] for text in texts.values()], device=self.device)
        positions = torch.tensor([[len(text) - 1] for text in texts.values()], device=self.device)
        columns = torch.arange(max(len(text) for text in texts.values()), device=self.device)
        mask = (columns <= positions)[:, None, None, :]
        return self.model.hidden(tokens, positions, mask, self.cache)[:, -1]

    def _anew(self, texts: Mapping[int, list[int]]) -> Tensor:
        tokens = [text[-self.block_size :] for text in texts.values()]
        return self.model.hidden(torch.tensor(tokens, device=self.device))[:, -1]
