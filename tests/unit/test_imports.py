"""Any module of the package can be the first one that is imported: none needs itself to be imported.

import-linter holds the order of the folders. A folder's `__init__` runs before any module in it, so one that imports
its modules can close a circle which no module closes by itself.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_veomni"


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _imported(tree: ast.Module) -> set[str]:
    """What runs when the module is imported: not what stands in functions, or is there for type checkers alone."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _needs(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules that run before each one, folders' own included, but for those of the folders that it is in."""
    needs: dict[str, set[str]] = {}
    for name, tree in trees.items():
        parts = [wanted.split(".") for wanted in _imported(tree)]
        ran = {".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
        needs[name] = {other for other in ran & trees.keys() if not f"{name}.".startswith(f"{other}.")}
    return needs


def test_no_module_needs_itself() -> None:
    trees = {_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert len(trees) > 200
    TopologicalSorter(_needs(trees)).prepare()


def test_a_circle_through_a_folder_is_found() -> None:
    code = {
        "p.a": "from p.b.x import one",
        "p.b": "from p.b.y import two",
        "p.b.x": "",
        "p.b.y": "from p.a import three",
    }
    with pytest.raises(CycleError, match="nodes are in a cycle"):
        TopologicalSorter(_needs({name: ast.parse(text) for name, text in code.items()})).prepare()
