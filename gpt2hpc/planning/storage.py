"""What a run leaves on disk: shards, checkpoints, logs; in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2hpc.config import Config, ModelConfig
from gpt2hpc.data.plan import UNIT_TOKENS
from gpt2hpc.data.shards import HEADER_BYTES
from gpt2hpc.training.checkpoint import outdated

TOKEN_BYTES = 2
"""uint16: `data/shards.py`."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: the weight and AdamW's two moments in fp32; Muon has one for the matrices inside the blocks."""
TENSORS_A_BLOCK, OTHER_TENSORS = 12, 4
"""Named parameters of a block, and wte, wpe and ln_f's two."""
TENSOR_BYTES = 4 + 378
"""Of each parameter beside that: AdamW's step, and four entries in the header of a safetensors file."""
RANK_BYTES = 15_400
"""Of each rank: its random number generators, as its file has them."""
MANIFEST_BYTES = 2_700
METRICS_LINE_BYTES = 250
LOG_LINE_BYTES = 20
BESIDE = 2
"""Checkpoints beside those that are kept: one being written, and the one that an attempt has resumed from."""


def stored_parameters(model: ModelConfig) -> int:
    """With the embedding's rows of padding, which are saved and sent too."""
    return model.parameters + (model.padded_vocab_size - model.vocab_size) * model.n_embd


@dataclass(frozen=True)
class Storage:
    """Bytes on disk at the end, and at most; `checkpoints` is how many are kept, `BESIDE` not counted."""

    data: int
    shards: int
    checkpoint: int
    checkpoints: int
    logs: int

    @property
    def peak(self) -> int:
        return self.data + (self.checkpoints + BESIDE) * self.checkpoint + self.logs


def checkpoint_bytes(config: Config, *, ranks: int) -> int:
    """Of one checkpoint, but for the history of metrics in it."""
    model = config.model
    state = STATE_BYTES * stored_parameters(model) - config.spared_bytes
    tensors = TENSORS_A_BLOCK * model.n_layer + OTHER_TENSORS
    return state + TENSOR_BYTES * tensors + RANK_BYTES * ranks + MANIFEST_BYTES


def kept(config: Config, *, save_steps: int | None) -> int:
    """Checkpoints at the end, where each `save_steps` steps are saved; at most, where time decides and that is None."""
    steps, saves, begins = config.train.steps, config.checkpoint, config.decay_begins
    for_decay = set() if begins is None else {begins}
    if save_steps is None:
        every = saves.keep_every_steps
        return saves.keep_last + ((steps - 1) // every if every else 0) + len(for_decay)
    saved = {*range(save_steps, steps, save_steps), steps, *for_decay}
    return len(saved - (outdated(saved, saves) - for_decay))


def storage(config: Config, *, data_tokens: int, ranks: int, save_steps: int | None) -> Storage:
    """Of a run that reads `data_tokens` different tokens of training, and its validation's; `save_steps` as for `kept`."""
    train = config.train
    tokens = data_tokens + train.eval_tokens
    shards = -(-data_tokens // UNIT_TOKENS) + 1
    lines = train.steps // train.log_every + train.steps // train.eval_every
    logs = lines * (METRICS_LINE_BYTES + LOG_LINE_BYTES)
    return Storage(
        data=TOKEN_BYTES * tokens + HEADER_BYTES * shards,
        shards=shards,
        checkpoint=checkpoint_bytes(config, ranks=ranks) + lines * METRICS_LINE_BYTES,
        checkpoints=kept(config, save_steps=save_steps),
        logs=logs,
    )
