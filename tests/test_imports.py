"""Imports go one way: no circle, not even one hidden under TYPE_CHECKING or inside a function."""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tp_mamba": "tp_mamba", "tp_mamba.kernels": "kernels", "tp_mamba.launch": "launch"}

# From the bottom up; a module imports from its own layer and those before it. Names stand for the module or for the
# package of that name.
LAYERS = (
    {"errors", "quoting", "kernels"},
    {"parallel", "options"},
    {"layers", "batch"},
    {"mixer"},
    {"models"},
    {"checkpoint", "state"},
    {"text"},
    {"engine"},
    {"config", "model"},
    {"training"},
    {"launch"},
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package by the name of its folder."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """What ``name`` imports of the package, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, set(known)) for name, path in known.items()}


def test_no_circle(graph: dict[str, set[str]]) -> None:
    # The verbs of launch/ import late on purpose, so that --help waits for no torch.
    library = {name: inner for name, inner in graph.items() if name.split(".")[:2] != ["tp_mamba", "launch"]}
    assert len(library) > 100
    try:
        list(TopologicalSorter(library).static_order())
    except CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_imports_go_up_the_layers(graph: dict[str, set[str]]) -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for name, inner in graph.items():
        if name == "tp_mamba":  # the public names, each imported when it is first used
            continue
        for imported in inner:
            if level[imported.split(".")[1]] > level[name.split(".")[1]]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(sorted(wrong))


def test_folders_are_those_of_the_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"] == FOLDERS


@pytest.mark.parametrize(
    "hidden",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tp_mamba.model import MambaForCausalLM\n",
        "def f():\n    import tp_mamba.model\n",
        "from tp_mamba import model\n",
    ],
)
def test_a_hidden_import_is_seen(hidden: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(hidden)
    assert imports("tp_mamba.module", path, {"tp_mamba", "tp_mamba.model"}) == {"tp_mamba.model"}
