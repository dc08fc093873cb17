"""What the documents say of the tree, the commands and the links is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpt2hpc import config_io
from gpt2hpc.__main__ import VERBS

ROOT = Path(__file__).parents[2]
PAGES = (
    *(
        "exit-codes",
        "doctor",
        "image",
        "plan",
        "memory",
        "slurm",
        "containers",
        "sites",
        "status",
        "data",
        "checkpoints",
        "hub",
        "weights",
        "evaluation",
    ),
    *("reports", "metrics", "optimizers"),
)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page}.md" for page in PAGES)]


def files() -> list[Path]:
    package = [path for path in (ROOT / "gpt2hpc").rglob("*.py") if path.stem != "__init__"]
    return sorted(path.relative_to(ROOT / "gpt2hpc") for path in package)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    for path in files():
        assert path.name in text, f"README.md does not mention {path}"
    tree = re.search(r"```\ngpt2hpc/\n(.*?)```", text, re.DOTALL)
    assert tree
    names = {path.name for path in ROOT.rglob("*.py")}
    for mentioned in re.findall(r"\b\w+\.py\b", tree[1]):
        assert mentioned in names, f"README.md mentions {mentioned}"


def test_commands_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
        shell = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
        named = re.findall(r"^gpt2hpc ([a-z-]+)", shell, re.MULTILINE) + re.findall(r"`gpt2hpc ([a-z-]+)", text)
        assert set(named) <= set(VERBS)
        assert set(re.findall(r"--preset ([\w-]+)", text)) <= set(config_io.presets())


def test_ci_runs_what_people_run() -> None:
    readme, commands = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    called = re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE)
    assert "test" in called
    for target in called:
        assert f"make {target}" in readme
