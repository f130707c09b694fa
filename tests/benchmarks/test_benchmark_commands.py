"""The benchmarks as a user starts them."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as listing

ROOT = Path(__file__).resolve().parents[2]


def test_every_benchmark_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in listing.NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.split(maxsplit=1)[1] == (module.__doc__ or "").splitlines()[0]
    runnable = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert runnable - {"__main__", "__init__"} == set(listing.NAMES)


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["scna"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "'scna' is no benchmark" in err
    assert "scan" in err


def from_root(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python at the root of the repository, as a user starts it."""
    import os

    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "command"), [("scan", ["benchmarks.scan"]), ("layer", ["benchmarks", "layer"])]
)
def test_without_a_gpu(name: str, command: list[str]) -> None:
    done = from_root("-m", *command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"python -m benchmarks.{name} needs an NVIDIA GPU" in done.stderr


def test_the_root_is_off_the_path() -> None:
    code = (
        "import benchmarks.__main__; from importlib.util import find_spec; "
        "print(find_spec('kernels'), find_spec('tp_mamba').origin)"
    )
    kernels, _, package = from_root("-c", code).stdout.strip().rpartition(" ")
    assert str(ROOT) not in kernels
    assert package.endswith("__init__.py")
