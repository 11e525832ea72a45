"""``core`` is pure: the standard library only, and of that nothing that does I/O, waits, or reads a clock."""

import ast
import sys
from pathlib import Path

import pytest

import geni_violin.core

FOLDER = Path(geni_violin.core.__file__).parent
ALLOWED = {"__future__", "collections", "dataclasses", "enum", "functools", "itertools", "re", "types", "typing"}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__"}


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "core imports by full name"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.py")), ids=lambda path: path.stem)
def test_core_imports_nothing_that_is_not_pure(path: Path) -> None:
    for name in _imports(ast.parse(path.read_text())):
        top = name.split(".")[0]
        if top == "geni_violin":
            assert name.startswith("geni_violin.core"), f"{path.name} imports {name}"
        else:
            assert top in sys.stdlib_module_names, f"{path.name} imports {name}, which is not in the standard library"
            assert top in ALLOWED, f"{path.name} imports {name}, which is not known to be pure"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.py")), ids=lambda path: path.stem)
def test_core_calls_nothing_that_does_io(path: Path) -> None:
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & IMPURE_CALLS
