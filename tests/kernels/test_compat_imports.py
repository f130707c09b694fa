"""The package of foreign call forms stands at the edge: it imports operators, and nothing of ours imports it."""

from __future__ import annotations

import ast
from pathlib import Path

import tp_mamba
import tp_mamba.kernels
import tp_mamba.launch

COMPAT = "tp_mamba.kernels.compat"


def imported_by(path: Path) -> set[str]:
    """The modules that a file names in its imports, wherever they stand in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_nothing_of_ours_imports_compat() -> None:
    folders = [
        Path(folder)
        for package in (tp_mamba, tp_mamba.kernels, tp_mamba.launch)
        for folder in package.__path__
    ]
    files = {path for folder in folders for path in folder.rglob("*.py") if "compat" not in path.parts}
    assert len(files) > 50
    for path in files:
        assert not [name for name in imported_by(path) if name.startswith(COMPAT)], path
