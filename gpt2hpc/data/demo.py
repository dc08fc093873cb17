"""Real text that is on every machine: the running Python's own documentation."""

from __future__ import annotations

import ast
import functools
import sysconfig
from pathlib import Path
from typing import Final

DEMO: Final = "demo"
_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


@functools.cache
def demo_documents() -> tuple[str, ...]:
    """The language reference's topics, then the library's docstrings, a module a document."""
    import pydoc_data.topics

    library = Path(sysconfig.get_paths()["stdlib"])
    modules = (
        path for path in sorted(library.rglob("*.py")) if _NO_LIBRARY.isdisjoint(path.relative_to(library).parts)
    )
    texts = (*(text for _, text in sorted(pydoc_data.topics.topics.items())), *map(_docstrings, modules))
    return tuple(text for text in texts if text)


def _docstrings(path: Path) -> str:
    """All docstrings of a file, each below the name of what it documents."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a test of syntax errors
        return ""
    named = (
        (getattr(node, "name", path.stem), ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return "\n\n".join(f"{name}\n{text}" for name, text in named if text)
