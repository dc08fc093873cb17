"""Are tokens those of GPT-2? Against some that are kept here, without a network."""

from __future__ import annotations

from gpt2hpc.data import backends, tokenizer
from gpt2hpc.trials.bench import Bench, TrialError

TEXT = "Hello, world! It's 3 o'clock.\n\nGrüße, 世界 🙂"
TOKENS = (
    *(15496, 11, 995, 0, 632, 338, 513, 267, 6, 15750, 13, 198, 198),
    *(8642, 9116, 39683, 68, 11, 220, 10310, 244, 45911, 234, 32485),
)


def run(bench: Bench) -> str:
    """By the reference, and by the faster program where it is installed."""
    names = []
    for backend in (backends.new_backend("tiktoken"), backends.new_backend("auto")):
        made = tuple(backend.encode([TEXT])[0].tolist())
        if made != (tokenizer.END_OF_TEXT, *TOKENS):
            at = next(
                (n for n, pair in enumerate(zip(made[1:], TOKENS, strict=False)) if pair[0] != pair[1]), len(TOKENS)
            )
            raise TrialError(f"{backend.name} makes other tokens of a text than GPT-2's, from the {at + 1}th on")
        names.append(backend.name)
    back = tokenizer.decode(list(TOKENS))
    if back != TEXT:
        raise TrialError(f"a text comes back changed, as {back!r}")
    return f"{len(TOKENS)} tokens of a text are GPT-2's, there and back, by {' and '.join(dict.fromkeys(names))}"
