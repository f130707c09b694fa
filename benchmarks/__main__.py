"""The list of the benchmarks, a line each."""

from __future__ import annotations

import ast
from pathlib import Path

NAMES = ("scan", "conv", "state_update", "norm", "gemm", "layer", "decode", "long", "cpu", "plot")


def summary(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing it."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main() -> int:
    print("python -m benchmarks.NAME, from the root of the repository; NAME is one of\n")
    for name in NAMES:
        print(f"  {name:13} {summary(name)}")
    print("\nEach but plot takes --cases, --samples, --seed and --json; --help says more.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
