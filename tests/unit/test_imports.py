"""Imports point one way, lazy ones too; and the verbs of a login node need no torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2hpc.trials.imports import OF_TRITON

PACKAGE = Path(__file__).parents[2] / "gpt2hpc"
LAYERS = (
    {
        "__init__",
        "errors",
        "durable",
        "run_dir",
        "config",
        "config_rules",
        "config_io",
        "config_errors",
        "config_origins",
        "cli",
        "garbage",
        "finding",
        "gpu_peaks",
    },
    {"cluster", "data", "model"},
    {"training", "evaluation"},
    {"starting", "opening", "jobs", "reporting", "checks", "planning"},
    {"trials"},
    {
        "prepare",
        "verify",
        "push_data",
        "stage",
        "init",
        "submit",
        "train_job",
        "dry_run",
        "prepare_array",
        "prepare_options",
        "pipeline",
        "train",
        "sync",
        "status",
        "logs",
        "stop",
        "cancel",
        "resume",
        "plot",
        "report",
        "doctor",
        "selftest",
        "image",
        "evaluate",
        "sample",
        "export",
        "plan",
    },
    {"__main__"},
)
TORCHLESS_PACKAGES = ("cluster", "data", "reporting", "checks", "planning")


def layer_of(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def upward(path: Path) -> list[str]:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "gpt2hpc" and len(parts) > 1:
            known = parts[1] if any(parts[1] in names for names in LAYERS) else "__init__"
            if known != own and layer_of(known) > layer_of(own):
                found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_upward_import(path: Path) -> None:
    assert upward(path) == []


def test_an_upward_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guilty = tmp_path / "data" / "guilty.py"
    guilty.parent.mkdir()
    guilty.write_text("def late():\n    from gpt2hpc.training import trainer\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert upward(guilty) == ["gpt2hpc.training.trainer"]


@pytest.mark.parametrize("package", TORCHLESS_PACKAGES)
def test_no_torch(package: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] in ("torch", "safetensors")], path


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["submit", "--help"],
        ["train", "--help"],
        ["status", "."],
        ["logs", "--help"],
        ["stop", "--help"],
        ["cancel", "--help"],
        ["resume", "--help"],
        ["sync", "--help"],
        ["doctor", "--help"],
        ["selftest", "--help"],
        ["image", "--help"],
        ["evaluate", "--help"],
        ["plot", "--help"],
        ["report", "--help"],
        ["prepare", "--help"],
        ["submit", "--dry-run"],
        ["plan", "--preset", "gpt2-124m", "--nodes", "1,2"],
        ["init", "--help"],
    ],
    ids=" ".join,
)
def test_runs_where_torch_is_not_importable(command: list[str], tmp_path: Path) -> None:
    blocked = (
        "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None; from gpt2hpc.__main__ import main; "
    )
    program = f"{blocked}sys.exit(main({command!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_no_module_shadows_the_standard_library() -> None:
    assert not {path.stem for path in modules()} & (set(sys.stdlib_module_names) - {"__main__", "__init__"})


def test_importing_does_nothing(tmp_path: Path) -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in modules()
        if path.stem not in ("__main__", "__init__")
    ]
    names = [name for name in names if name not in OF_TRITON or importlib.util.find_spec("triton")]
    program = f"import importlib, logging, signal\nfor name in {names!r}: importlib.import_module(name)\n"
    program += "assert not logging.root.handlers and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
