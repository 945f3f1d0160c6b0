"""The direction of imports, so that each package can be read, copied and replaced on its own."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"enact", "models", "datasets", "util", "configs", "tools", "engine", "main"}
# What each package may import of ours.
ALLOWED = {
    "enact": {"enact"},
    "util": {"util"},
    "configs": {"configs", "util"},
    "datasets": {"datasets", "util"},
    "models": {"models", "util"},
    "models/__init__.py": {"models", "util", "configs", "enact"},
}


def imported(file: Path) -> set[str]:
    """The first names of the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


FILES = [file.relative_to(ROOT) for package in ("enact", "util", "configs", "datasets", "models")
         for file in sorted((ROOT / package).glob("*.py"))]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file: Path) -> None:
    allowed = ALLOWED.get(str(file), ALLOWED[file.parts[0]])
    assert imported(ROOT / file) & OURS <= allowed


def test_enact_needs_torch_alone() -> None:
    outside = set().union(*(imported(file) for file in (ROOT / "enact").glob("*.py"))) - {"torch", "enact"}
    assert outside <= {"__future__"} | sys.stdlib_module_names
