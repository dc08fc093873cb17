"""What a run leaves on disk: shards, checkpoints, logs; in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2hpc.config import CheckpointConfig, Config, ModelConfig
from gpt2hpc.data.plan import UNIT_TOKENS
from gpt2hpc.data.shards import HEADER_BYTES

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


def stored_parameters(model: ModelConfig) -> int:
    """With the embedding's rows of padding, which are saved and sent too."""
    return model.parameters + (model.padded_vocab_size - model.vocab_size) * model.n_embd


@dataclass(frozen=True)
class Storage:
    """Bytes on disk at the end, and at most; `checkpoints` is how many are kept, one being written beside them."""

    data: int
    shards: int
    checkpoint: int
    checkpoints: int
    logs: int

    @property
    def peak(self) -> int:
        return self.data + (self.checkpoints + 1) * self.checkpoint + self.logs


def checkpoint_bytes(config: Config, *, ranks: int) -> int:
    """Of one checkpoint, but for the history of metrics in it."""
    model = config.model
    state = STATE_BYTES * stored_parameters(model) - config.spared_bytes
    tensors = TENSORS_A_BLOCK * model.n_layer + OTHER_TENSORS
    return state + TENSOR_BYTES * tensors + RANK_BYTES * ranks + MANIFEST_BYTES


def kept(config: CheckpointConfig, *, steps: int) -> int:
    """Checkpoints at the end: the last ones, and those of `keep_every_steps` before them."""
    every = config.keep_every_steps
    return config.keep_last + (max(0, steps // every - 1) if every else 0)


def storage(config: Config, *, data_tokens: int, ranks: int) -> Storage:
    """Of a run that reads `data_tokens` different tokens of training, and its validation's."""
    train = config.train
    tokens = data_tokens + train.eval_tokens
    shards = -(-data_tokens // UNIT_TOKENS) + 1
    lines = train.steps // train.log_every + train.steps // train.eval_every
    logs = lines * (METRICS_LINE_BYTES + LOG_LINE_BYTES)
    return Storage(
        data=TOKEN_BYTES * tokens + HEADER_BYTES * shards,
        shards=shards,
        checkpoint=checkpoint_bytes(config, ranks=ranks) + lines * METRICS_LINE_BYTES,
        checkpoints=kept(config.checkpoint, steps=train.steps) + (config.decay_begins is not None),
        logs=logs,
    )
