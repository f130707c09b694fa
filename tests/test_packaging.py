"""What an install of this package holds: every module, under its own names only."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def source_folder(package: str) -> Path:
    """Where the modules of ``package`` lie in the checkout, by pyproject's mapping."""
    mapping = SETUPTOOLS["package-dir"]
    if package in mapping:
        return ROOT / mapping[package]
    parent, _, name = package.rpartition(".")
    return source_folder(parent) / name


def packages_on_disk() -> set[str]:
    """Every folder with modules under the three mapped roots, as a package name."""
    found = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for module in (ROOT / folder).rglob("*.py"):
            inner = module.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    return found


def modules_on_disk() -> set[str]:
    """Every module, as its path inside a wheel."""
    return {
        "/".join((*package.split("."), path.name))
        for package in SETUPTOOLS["packages"]
        for path in source_folder(package).glob("*.py")
    }


def test_every_package_on_disk_is_listed() -> None:
    # An unlisted one is importable from an editable install and missing from the wheel.
    assert packages_on_disk() == set(SETUPTOOLS["packages"])


def test_every_package_has_an_init() -> None:
    missing = [p for p in SETUPTOOLS["packages"] if not (source_folder(p) / "__init__.py").is_file()]
    assert not missing


@pytest.mark.parametrize("name", ["kernels", "launch"])
def test_mapped_folders_are_inert(name: str) -> None:
    # In a checkout the folder is importable under its bare name too, and would run twice.
    body = ast.parse((ROOT / name / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("name", ["kernels", "launch"])
def test_bare_names_are_not_ours(name: str) -> None:
    spec = find_spec(name)
    places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
    # tests/kernels and tests/launch make namespace packages under pytest's import mode: those hold tests only.
    assert not [place for place in places if Path(place).is_relative_to(ROOT / name)]


@pytest.mark.parametrize("name", ["kernels", "launch"])
def test_safe_path_keeps_the_checkout_out(name: str) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
    status = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, check=False).returncode
    published = find_spec(name)
    assert status == int(published is not None and published.origin is not None)


def test_mapped_packages_are_the_checkouts_folders() -> None:
    for name in ("kernels", "launch"):
        package = importlib.import_module(f"tp_mamba.{name}")
        assert package.__doc__


def test_no_module_of_launch_hides_one_of_the_standard_library() -> None:
    # `torchrun launch/x.py` puts that folder first on the path.
    names = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_no_package_in_tests() -> None:
    # One would put the checkout, and with it a stray `kernels`, on pytest's import path.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_names_of_test_files_are_unique() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))


def test_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="tp-mamba")
    assert script.value == "tp_mamba.launch.cli:main"
    assert callable(script.load())


def build_wheel(source: Path, out: Path) -> Path:
    """Build ``source`` with the setuptools that is installed; where it is too old, with one that pip fetches."""
    if find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77:
        # setuptools rewrites sys.argv while it builds, so the folder goes in as a literal.
        code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
        command = [sys.executable, "-P", "-c", code]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    # From a copy: a build writes into its source folder.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("tp_mamba", "kernels", "launch"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    wheel = build_wheel(source, tmp_path)
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert not modules_on_disk() - packed
    assert "tp_mamba/py.typed" in packed
    assert {name.split("/")[0] for name in packed} == {"tp_mamba", f"{wheel.name.split('-py3')[0]}.dist-info"}
