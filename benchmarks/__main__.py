"""The list of the benchmarks, a line each; with a name, that benchmark."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

MEASURE = (
    "scan", "scan_backward", "conv", "state_update", "norm", "backward", "gemm", "layer", "decode", "collectives",
    "whole", "long", "trace", "prefix", "cpu",
)  # fmt: skip
SHOW = ("plot", "table")
NAMES = MEASURE + SHOW


def summary(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing it."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in NAMES:
        sys.argv = [f"benchmarks.{name}", *rest]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        return 0
    if name not in ("", "-h", "--help"):
        print(
            f"{name!r} is no benchmark: python -m benchmarks lists them ({', '.join(NAMES)})", file=sys.stderr
        )
        return 2
    print(
        "python -m benchmarks.NAME, from the root of the repository. On a GPU, but for cpu, NAME measures\n"
    )
    _list(MEASURE)
    print("\nand takes --cases, --samples, --seed and --json; recorded results are shown by\n")
    _list(SHOW)
    print("\n--help says more of each. For example:\n")
    print('  python -m benchmarks.scan --cases "D 8192" --json scan.json')
    print("  python -m benchmarks.plot scan.json --out .")
    return 0


def _list(names: Sequence[str]) -> None:
    for name in names:
        print(f"  {name:13} {summary(name)}")


if __name__ == "__main__":
    raise SystemExit(main())
