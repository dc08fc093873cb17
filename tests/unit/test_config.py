from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2hpc import config_io
from gpt2hpc.config import Config
from gpt2hpc.config_rules import check, grad_accum_steps, warnings
from gpt2hpc.errors import ConfigError, Gpt2hpcError, UsageError
from gpt2hpc.run_dir import RunDir


def parse(*argv: str) -> Config:
    parser = config_io.new_parser("test", "")
    parser.add_argument("--run-dir", type=str)
    return config_io.parse(parser, argv)[1]


@pytest.mark.parametrize(
    ("preset", "shape", "rate", "batch", "parameters"),
    [  # GPT-2 table 2; GPT-3 table 2.1; parameters of the published checkpoints
        ("gpt2-124m", (12, 12, 768), 6.0e-4, 524_288, 124_439_808),
        ("gpt2-350m", (24, 16, 1024), 3.0e-4, 524_288, 354_823_168),
        ("gpt2-774m", (36, 20, 1280), 2.5e-4, 524_288, 774_030_080),
        ("gpt2-1558m", (48, 25, 1600), 2.0e-4, 1_048_576, 1_557_611_200),
    ],
)
def test_presets_are_the_papers(
    preset: str, shape: tuple[int, int, int], rate: float, batch: int, parameters: int
) -> None:
    config = parse("--preset", preset)
    model, optimizer = config.model, config.optimizer
    assert (model.n_layer, model.n_head, model.n_embd) == shape
    assert model.parameters == parameters
    assert (optimizer.learning_rate, config.train.tokens_per_step) == (rate, batch)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.grad_clip, optimizer.min_lr_ratio) == (0.1, 1.0, 0.1)
    assert optimizer.warmup_tokens == 375_000_000
    assert warnings(config) == []
    for world_size in (1, 2, 4, 8, 16, 32):
        grad_accum_steps(config, world_size=world_size)


def test_every_preset_loads() -> None:
    assert set(config_io.presets()) == {"smoke", "gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m"}
    for name in config_io.presets():
        check(parse("--preset", name))


def test_flags_beat_files_beat_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  seed: 5\n  log_every: 7\n")
    config = parse("--train.log_every", "9", "--config", str(file), "--preset", "smoke")
    assert (config.model.n_embd, config.train.seed, config.train.log_every) == (128, 5, 9)


def test_short_forms() -> None:
    train = parse("--preset", "smoke", "--steps", "40", "--device=cpu", "--seed", "3", "--deterministic").train
    assert (train.total_steps, train.device, train.seed, train.deterministic) == (40, "cpu", 3, True)


@pytest.mark.parametrize(
    ("argv", "kind", "words"),
    [
        (["--preset", "gpt2-125m"], UsageError, ["gpt2-125m", "did you mean gpt2-124m"]),
        (["--model.n_layers", "3"], UsageError, ["--model.n_layers", "did you mean --model.n_layer"]),
        (["--data", "somewhere"], UsageError, ["--data", "--data.dir"]),
        (["--model.n_layer", "many"], ConfigError, ["model.n_layer=many", "a whole number"]),
        (["--train.precision", "bf17"], ConfigError, ["train.precision=bf17", "auto, bf16, fp16, fp32"]),
        (["--train.tokens_per_step", "null"], ConfigError, ["train.tokens_per_step=None", "a whole number"]),
        (["--train.total_steps", "1e3"], ConfigError, ["train.total_steps=1e3", "a whole number or null"]),
        (["--model.n_embd", "770"], ConfigError, ["model.n_embd=770", "model.n_head=12", "try 780"]),
        (["--model.dropout", "1.0"], ConfigError, ["model.dropout=1.0", "below 1"]),
        (["--optimizer.learning_rate", "-1"], ConfigError, ["optimizer.learning_rate=-1.0", "above 0"]),
        (["--optimizer.learning_rate", "inf"], ConfigError, ["optimizer.learning_rate=inf"]),
        (["--optimizer.min_lr_ratio", "2"], ConfigError, ["optimizer.min_lr_ratio=2.0", "0 to 1"]),
        (["--model.padded_vocab_size", "50000"], ConfigError, ["padded_vocab_size=50000", "try 50304"]),
        (["--train.total_tokens", "1000"], ConfigError, ["train.total_tokens=1000", "524288"]),
        (["--train.total_steps", "12:30:00"], UsageError, ["12:30:00", "base 60"]),
        (["--checkpoint.every_minutes=1:30"], UsageError, ["1:30", "base 60"]),
        (["--n_layer", "3"], UsageError, ["--n_layer", "did you mean --model.n_layer"]),
        (["--zzz", "3"], UsageError, ["unknown option --zzz; see --help"]),
        (
            ["--steps", "100"],
            ConfigError,
            ["optimizer.warmup_tokens=375000000", "try --optimizer.warmup_tokens 5242880"],
        ),
        (["--optimizer.schedule", "linear"], ConfigError, ["optimizer.schedule=linear", "cosine, wsd"]),
        (
            ["--train.cuda_graphs=true", "--train.compile=false"],
            ConfigError,
            ["train.cuda_graphs=true", "train.compile=false", "leave out one"],
        ),
        (
            ["--train.cuda_graphs=true", "--train.shard_optimizer=true"],
            ConfigError,
            ["train.cuda_graphs=true", "train.shard_optimizer=true", "leave out one"],
        ),
        (["--optimizer.decay_share", "0"], ConfigError, ["optimizer.decay_share=0.0", "above 0"]),
        (
            ["--optimizer.schedule=wsd", "--steps=1000", "--optimizer.decay_share=0.5"],
            ConfigError,
            [
                "decay_share=0.5 of 1000 steps begins at step 500",
                "warm-up of 715 steps",
                "--optimizer.warmup_tokens 52428800",
            ],
        ),
        (["--seed", "-1"], ConfigError, ["train.seed=-1", "0 or above"]),
        (["--seed", "18446744073709551616"], ConfigError, ["train.seed=18446744073709551616", "below 2^64"]),
        (["--checkpoint.keep_last", "1"], ConfigError, ["checkpoint.keep_last=1", "2 or more"]),
        (["--checkpoint.every_steps", "0"], ConfigError, ["checkpoint.every_steps=0", "above 0"]),
        (
            ["--train.tokens_per_step", "500000"],
            ConfigError,
            ["train.tokens_per_step=500000", "16 × 1024 × 1 = 16384", "try train.tokens_per_step=507904"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_names_key_value_and_mend(argv: list[str], kind: type[Gpt2hpcError], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        parse(*argv)
    for word in words:
        assert word in caught.value.line
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  n_layr: 4\n", ["model.n_layr", "did you mean model.n_layer"]),
        ("modl:\n  n_layer: 4\n", ["modl.n_layer", "did you mean model.n_layer"]),
        ("train:\n  seed: [1]\n", ["train.seed", "a whole number"]),
        ("- 4\n", ["holds no settings"]),
        ("model: 5\n", ["model=5 holds no settings"]),
        ("model: [1]\n", ["model=[1] holds no settings"]),
        ("model:\n", ["model=None holds no settings"]),
        ("model:\n  n_layer: null\n", ["model.n_layer=null", "a whole number"]),
        ("preset: smoke\n", ["unknown setting preset"]),
        ("model.n_layer: 3\n", ["write n_layer indented below `model:`"]),
        ("train:\n  total_steps: 12:30:00\n", ["12:30:00", "base 60"]),
        ("run_dir: x\n", ["unknown setting run_dir"]),
        ("model: [\n", ["is not YAML"]),
    ],
)
def test_a_bad_file_names_key_value_and_mend(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file))
    for word in words:
        assert word in caught.value.line


def test_the_largest_seed() -> None:
    torch.manual_seed(parse("--seed", "18446744073709551615").train.seed)


def test_yaml_words_for_true(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train:\n  compile: on\n")
    assert parse("--config", str(tmp_path / "mine.yaml")).train.compile is True
    assert parse().train.compile is None


def test_a_value_may_be_the_name_of_a_section() -> None:
    assert parse("--data.dir", "data").data.dir == "data"


def test_abbreviations_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean --run-dir"):
        parse("--run-di", "3")
    with pytest.raises(UsageError, match="--run-dir is empty"):
        parse("--run-dir", "")


def test_nothing_saved_nothing_to_be_true_to(tmp_path: Path) -> None:
    """A start that failed before its first checkpoint leaves settings that may be mended."""
    run = RunDir(tmp_path)
    config_io.store(parse("--preset", "smoke"), run.config)
    assert config_io.changes(run, parse("--preset", "smoke", "--seed", "4")) == {}
    (run.checkpoints / "x_tiny_step0000001.0001.tmp").mkdir(parents=True)
    assert config_io.changes(run, parse("--preset", "smoke", "--seed", "4")) == {}, "a killed first save saved nothing"


def test_a_damaged_config_of_a_run_is_one_line(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"model: {n_layer: x}", b"train:\n  seed: " + b"9" * 5000):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            config_io.load(tmp_path / "config.yaml")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--config=/nowhere\.yaml cannot be read"):
        parse("--config", "/nowhere.yaml")


def test_the_batch_must_divide() -> None:
    config = parse("--preset", "gpt2-124m")
    assert grad_accum_steps(config, world_size=8) == 4
    with pytest.raises(ConfigError, match=r"world size = 16 × 1024 × 3 = 49152; try train\.tokens_per_step=540672"):
        grad_accum_steps(config, world_size=3)
    with pytest.raises(ConfigError, match=r"try train\.micro_batch_size=8, or "):
        grad_accum_steps(config, world_size=64)


def test_the_mend_of_a_batch_works() -> None:
    config = parse("--preset", "gpt2-124m")
    for world_size in range(1, 70):
        try:
            grad_accum_steps(config, world_size=world_size)
        except ConfigError as error:
            tokens = int(error.line.rpartition("=")[2])
            mended = dataclasses.replace(config, train=dataclasses.replace(config.train, tokens_per_step=tokens))
            grad_accum_steps(mended, world_size=world_size)


def test_wasteful_sizes_get_the_better_number() -> None:
    model = dataclasses.replace(Config().model, padded_vocab_size=50_257, n_embd=780)
    lines = warnings(dataclasses.replace(Config(), model=model))
    assert len(lines) == 2
    assert "50304 is faster" in lines[0]
    assert "832 is faster" in lines[1]
    model = dataclasses.replace(Config().model, n_embd=768, n_head=64)
    assert "12 heads of 64 are faster" in warnings(dataclasses.replace(Config(), model=model))[0]


def test_config_is_frozen() -> None:
    setting: Any = Config().train
    with pytest.raises(dataclasses.FrozenInstanceError):
        setting.seed = 1


def test_settings_survive_the_file(tmp_path: Path) -> None:
    config = parse("--preset", "gpt2-1558m", "--checkpoint.every_steps", "7", "--train.total_steps", "3000")
    config_io.store(config, tmp_path / "config.yaml")
    assert config_io.load(tmp_path / "config.yaml") == config


def test_a_run_goes_on_with_its_own_settings(tmp_path: Path) -> None:
    """Only what is named on the command line can differ from the stored settings."""
    run = RunDir(tmp_path)
    config_io.store(parse("--preset", "smoke", "--model.dropout", "0.2"), run.config)
    again = parse("--run-dir", str(tmp_path), "--preset", "smoke")
    assert again.model.dropout == 0.2
    (run.checkpoints / "x_tiny_step0000001").mkdir(parents=True)
    assert config_io.changes(run, again) == {}
    longer = parse("--run-dir", str(tmp_path), "--steps", "900", "--checkpoint.keep_last", "5")
    assert sorted(config_io.changes(run, longer)) == ["checkpoint.keep_last", "train.total_steps"]


def test_a_run_begun_before_there_was_a_setting_may_take_it_up(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    config_io.store(parse("--preset", "smoke"), run.config)
    lines = run.config.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.strip().startswith(("tensorboard:", "wandb:"))]
    assert len(older) == len(lines) - 2
    run.config.write_text("".join(older))
    (run.checkpoints / "x_tiny_step0000001").mkdir(parents=True)
    assert config_io.changes(run, parse("--run-dir", str(tmp_path))) == {}
    with_both = parse("--run-dir", str(tmp_path), "--train.tensorboard", "true", "--train.wandb", "mine")
    assert config_io.changes(run, with_both) == {"train.tensorboard": (False, True), "train.wandb": (None, "mine")}


def test_other_mathematics_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    config_io.store(parse("--preset", "smoke"), run.config)
    (run.checkpoints / "x_tiny_step0000001").mkdir(parents=True)
    other = parse("--run-dir", str(tmp_path), "--optimizer.learning_rate", "1e-3", "--seed", "4", "--steps", "900")
    with pytest.raises(ConfigError) as caught:
        config_io.changes(run, other)
    assert "optimizer.learning_rate=0.001 (the run has 0.003)" in caught.value.line
    assert "train.seed=4 (the run has 1337)" in caught.value.line
    assert "total_steps" not in caught.value.line
