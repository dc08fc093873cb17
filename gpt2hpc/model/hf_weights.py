"""GPT-2 of the transformers library, in and out: its weights and settings, ours.

Its projections are `Conv1D`, whose weight is the transpose of a linear layer's; its embedding has no rows of padding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2hpc import durable
from gpt2hpc.config import ModelConfig
from gpt2hpc.data import hub
from gpt2hpc.data.hub import Repository
from gpt2hpc.data.patience import asked
from gpt2hpc.data.shards import sha256_of
from gpt2hpc.errors import ConfigError, DataError, MissingError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2Config

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PUBLISHER = "openai-community"
FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]

_PREFIX = "transformer."
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# What our model computes, for each setting of transformers' GPT-2 that changes the mathematics (its default is the first).
_COMPUTED: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def require_transformers() -> None:
    """Raise MissingError where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingError("transformers is not installed, and this command needs it: pip install 'gpt2hpc[train]'")


def is_published(source: str) -> bool:
    """Whether it names one of the four models that OpenAI published: `gpt2-xl` or `openai-community/gpt2-xl`."""
    return source.removeprefix(f"{PUBLISHER}/") in PUBLISHED


def is_directory(path: Path) -> bool:
    """Whether `path` is a directory as transformers writes them, of whatever model."""
    facts = durable.read_json(path / "config.json")
    return isinstance(facts, dict) and "model_type" in facts


def pretrained(source: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and fp32 weights, by our names, of a published model or of a transformers directory.

    Raises DataError where they cannot be had or are damaged, ConfigError where they are no GPT-2.
    """
    require_transformers()
    directory = _downloaded(source) if is_published(source) else Path(source)
    config = _config(directory, source)
    return config, _weights(directory, source)


def _downloaded(source: str) -> Path:
    """The published model in the Hub client's own cache, fetched unless it is there."""
    import huggingface_hub

    model = Repository(f"{PUBLISHER}/{source.removeprefix(f'{PUBLISHER}/')}", kind="model")
    try:
        with hub.quiet():
            found = asked(model, lambda api: huggingface_hub.snapshot_download(model.repo, allow_patterns=FILES))
    except DataError as error:
        raise DataError(
            f"{error.line} (`gpt2hpc stage --weights {model.repo} --out DIR`, then --init DIR/models/{model.repo})"
        ) from None
    for path in Path(found).glob("*.safetensors"):
        blob = path.resolve()  # the cache names a large file by its sha256, which the client itself does not compare
        if _SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            raise DataError(f"{blob} is damaged: its sha256 is not its name; delete it, and it is fetched again")
    return Path(found)


def _config(directory: Path, source: str) -> ModelConfig:
    """Shape of the model; ConfigError for one that is no GPT-2, or one with a twist."""
    facts = durable.read_json(directory / "config.json")
    if not isinstance(facts, dict) or facts.get("model_type") != "gpt2":
        kind = facts.get("model_type") if isinstance(facts, dict) else None
        found = f"a model of type {kind}" if kind else "no config.json of a model"
        raise ConfigError(f"{source} holds {found}, not a GPT-2 of transformers; choose one of {', '.join(PUBLISHED)}")
    for name, computed in _COMPUTED.items():
        if facts.get(name, computed[0]) not in computed:
            raise ConfigError(
                f"{source} has {name}={facts[name]} in its config.json, and GPT-2 has {computed[0]}; choose other weights"
            )
    try:
        width = int(facts.get("n_embd", 768))
        config = ModelConfig(
            n_layer=int(facts.get("n_layer", 12)),
            n_head=int(facts.get("n_head", 12)),
            n_embd=width,
            block_size=int(facts.get("n_positions", 1024)),
            vocab_size=int(facts.get("vocab_size", 50_257)),
            padded_vocab_size=int(facts.get("vocab_size", 50_257)),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source} has a config.json that is no GPT-2's ({error}); choose other weights") from None
    if (inner := facts.get("n_inner")) not in (None, 4 * width):
        raise ConfigError(
            f"{source} has n_inner={inner} in its config.json, and GPT-2 has {4 * width}; choose other weights"
        )
    return config


def _weights(directory: Path, source: str) -> dict[str, Tensor]:
    """Through transformers, which knows the older names and files in parts; nothing is unpickled."""
    from safetensors import SafetensorError
    from transformers import GPT2LMHeadModel

    if not list(directory.glob("*.safetensors")):
        raise DataError(
            f"{source} holds no model.safetensors, and pickled weights are not read; write it anew with transformers' save_pretrained"
        )
    try:
        with quiet_transformers():
            model, told = GPT2LMHeadModel.from_pretrained(
                directory, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{source} cannot be read by transformers ({said}); fetch or export it again") from error
    if missing := sorted(told["missing_keys"]):
        raise DataError(f"{source} lacks {', '.join(missing[:3])}; fetch or export it again")
    return from_state_dict(model.state_dict())


def from_state_dict(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by our names, in fp32, as views where they are; the head is the embedding, and masks are no weights."""
    return {
        (name := key.removeprefix(_PREFIX)): (tensor.t() if name.endswith(_TRANSPOSED) else tensor).float()
        for key, tensor in theirs.items()
        if key != "lm_head.weight" and not key.endswith((".attn.bias", ".attn.masked_bias"))
    }


def to_state_dict(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters by the names of GPT2LMHeadModel, without the rows of padding."""
    result = {}
    for name, tensor in weights.items():
        if name == "wte.weight":
            tensor = tensor[: config.vocab_size]
        result[_PREFIX + name] = (tensor.t() if name.endswith(_TRANSPOSED) else tensor).contiguous()
    return result


def to_config(config: ModelConfig, *, end_of_text: int | None) -> GPT2Config:
    """Settings of GPT2LMHeadModel; `end_of_text` begins and ends a document, None where the vocabulary has no such token."""
    from transformers import GPT2Config

    facts: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text),
    }
    return GPT2Config(architectures=["GPT2LMHeadModel"], **facts)


def write(directory: Path, config: ModelConfig, weights: Mapping[str, Tensor], *, end_of_text: int | None) -> None:
    """Write config.json, generation_config.json and model.safetensors, as GPT2LMHeadModel's save_pretrained does."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    theirs = to_config(config, end_of_text=end_of_text)
    theirs.save_pretrained(directory)
    GenerationConfig.from_model_config(theirs).save_pretrained(directory)
    save_file(to_state_dict(weights, config), directory / "model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without bars and remarks on standard error: what is wrong is said as an error of ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
