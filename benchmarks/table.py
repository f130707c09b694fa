"""Writes recorded results as a Markdown table, for the README and docs/kernels/.

    python -m benchmarks.table benchmarks/results/h200/*.json --cases full

One line per case, of several files the newest. The last column is the error that the case was measured with, the
largest of its outputs' ``|output - float64| / |float64|``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.recorded import Result, read, source, unit
from benchmarks.report import figures

HEAD = ("case", "time", "limit", "of limit", "times faster than", "error")


def line(result: Result) -> str:
    """One line of the table."""
    row = result.row
    median = row.median or 0.0
    cells = (
        f"{result.benchmark}: {row.case}",
        f"{figures(median)} {unit(row)}",
        "" if row.limit is None else figures(row.limit),
        "" if row.share is None else f"{row.share:.0%}",
        ", ".join(f"{name} {figures(time / median)}" for name, time in row.peers.items()),
        str(max(row.errors, key=lambda error: error.norm, default="")),
    )
    return f"| {' | '.join(cells)} |"


def lines(results: Iterable[Result]) -> list[str]:
    """The table, its head included."""
    return [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", *map(line, results)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", metavar="FILE", nargs="+", type=Path, help="what --json wrote")
    parser.add_argument("--cases", metavar="TEXT", default="", help="only those with TEXT in their name")
    options = parser.parse_args(argv)
    try:
        results = read(options.results)
    except ValueError as failure:
        print(failure, file=sys.stderr)
        return 2
    chosen = [result for result in results if options.cases in f"{result.benchmark}: {result.row.case}"]
    if not chosen:
        print(
            f"no case with a time has {options.cases!r} in its name: give a part of another", file=sys.stderr
        )
        return 2
    print("\n".join(lines(chosen)))
    print(f"\n{source(chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
