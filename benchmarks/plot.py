"""Draws recorded results to PNG: share of the limit by case, time by length, time by batch.

    python -m benchmarks.plot benchmarks/results/*.json --out benchmarks/results

writes share.png, length.png and batch.png, each from the results that have something for it. Needs matplotlib
(``pip install -e ".[bench]"``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.case import UNITS
from benchmarks.report import Row, figures, read_json


class Result(NamedTuple):
    """One row and the benchmark that it is of."""

    benchmark: str
    row: Row

    def seconds(self, value: float) -> float:
        return value / UNITS[self.row.unit]


def read(paths: Iterable[Path]) -> tuple[list[Result], str]:
    """Every row that has a time, and a line about where they come from.

    Raises:
        ValueError: a file is no result.
    """
    results, sources = [], []
    for path in paths:
        benchmark, environment, rows = read_json(path)
        results += [Result(benchmark, row) for row in rows if row.median is not None]
        commit = (environment["commit"] or "unknown")[:12]
        sources.append(
            f"{environment['hardware']}, torch {environment['torch']}, commit {commit}, {environment['date'][:10]}"
        )
    return results, "; ".join(dict.fromkeys(sources))


def draw_share(axes: Any, results: Sequence[Result]) -> bool:
    """A bar a case: its limit over its time, with the time beside it."""
    chosen = [result for result in results if result.row.share is not None]
    positions = range(len(chosen))
    benchmarks = list(dict.fromkeys(result.benchmark for result in chosen))
    colours = {name: f"C{i % 10}" for i, name in enumerate(benchmarks)}
    axes.barh(
        positions,
        [100 * (result.row.share or 0) for result in chosen],
        color=[colours[result.benchmark] for result in chosen],
    )
    for position, (_, row) in zip(positions, chosen, strict=True):
        axes.text(
            100 * (row.share or 0) + 0.7,
            position,
            f"{figures(row.median or 0)} {row.unit}",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(positions, [f"{name}: {row.case}" for name, row in chosen], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("share of the limit, %")
    axes.figure.set_size_inches(10, 1.5 + 0.2 * len(chosen))
    return bool(chosen)


def draw_length(axes: Any, results: Sequence[Result]) -> bool:
    """Lines over the tokens of one sequence."""
    return _draw_lines(
        axes, [r for r in results if r.row.sizes.get("sequences") == 1], "length", "tokens of one sequence"
    )


def draw_batch(axes: Any, results: Sequence[Result]) -> bool:
    """Lines over the sequences that take a step together."""
    return _draw_lines(axes, results, "batch", "sequences")


def _draw_lines(axes: Any, results: Sequence[Result], over: str, label: str) -> bool:
    """A line of times a benchmark, D and form; dashed its limit, dotted its recorded peers."""
    lines: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if over in result.row.sizes:
            key = (result.benchmark, result.row.sizes.get("D"), result.row.sizes.get("form"))
            lines.setdefault(key, []).append(result)
    lines = {key: line for key, line in lines.items() if len(line) > 1}
    for i, ((benchmark, channels, form), line) in enumerate(lines.items()):
        line.sort(key=lambda result: result.row.sizes[over])
        x, colour = [result.row.sizes[over] for result in line], f"C{i % 10}"
        name = ", ".join([benchmark, *([form] if form else []), *([f"D {channels}"] if channels else [])])
        axes.plot(x, [r.seconds(r.row.median or 0) for r in line], "o-", color=colour, label=name)
        if all(result.row.limit for result in line):
            axes.plot(x, [r.seconds(r.row.limit or 0) for r in line], "--", color=colour, linewidth=0.8)
        for peer in dict.fromkeys(peer for result in line for peer in result.row.peers):
            known = [result for result in line if peer in result.row.peers]
            axes.plot(
                [result.row.sizes[over] for result in known],
                [result.seconds(result.row.peers[peer]) for result in known],
                "x:",
                color=colour,
                linewidth=0.8,
                markersize=4,
            )
            axes.annotate(
                peer, (known[-1].row.sizes[over], known[-1].seconds(known[-1].row.peers[peer])), fontsize=6
            )
    if lines:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({result.row.sizes[over] for line in lines.values() for result in line})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel(label)
        axes.set_ylabel("seconds (dashed: limit; dotted: recorded peers)")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        axes.figure.set_size_inches(10, 7)
    return bool(lines)


PLOTS = {"share": draw_share, "length": draw_length, "batch": draw_batch}


def draw(results: Sequence[Result], source: str, folder: Path) -> list[Path]:
    """Write the plots that ``results`` have something for; returns their paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw_one in PLOTS.items():
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        if draw_one(axes, results):
            axes.set_title(source, fontsize=7)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", metavar="FILE", nargs="+", type=Path, help="what --json wrote")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path(), help="where the PNG files go")
    options = parser.parse_args(argv)
    try:
        results, source = read(options.results)
        written = draw(results, source, options.out)
    except ValueError as failure:
        print(failure, file=sys.stderr)
        return 2
    except ModuleNotFoundError as failure:
        if (failure.name or "").partition(".")[0] != "matplotlib":
            raise
        print('python -m benchmarks.plot needs matplotlib: pip install -e ".[bench]"', file=sys.stderr)
        return 2
    if not written:
        print("none of these results has a time to draw: record some with --json", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
