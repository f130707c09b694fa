"""Draws recorded results to PNG: share of the limit by case, time by length and by batch, and a whole model.

    python -m benchmarks.plot benchmarks/results/h200/*.json --out benchmarks/results/h200

writes share.png, length.png, batch.png and whole.png, each from the results that have something for it; of a case in
several files the newest is drawn. Needs matplotlib (``pip install -e ".[bench]"``).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.plot_whole import draw_whole
from benchmarks.recorded import TITLES, Result, read, source, unit
from benchmarks.report import Row, figures

WIDTH, DPI = 8.0, 160
"""Inches and dots: letters of 8 points are 11 pixels high where a figure is shown 800 pixels wide."""

SHADES = 64
"""Colours of a file: enough for lines and letters, and a third of the bytes."""

LIMITS = {
    "scan": "the exponential unit",
    "scan_backward": "the exponential unit",
    "conv": "bytes",
    "state_update": "bytes",
    "norm": "bytes",
    "gemm": "bytes or operations",
    "layer": "its four products",
    "decode": "bytes",
    "collectives": "the link",
    "whole": "bytes or operations",
    "cpu": "its products",
}
"""What a benchmark cannot be faster than."""

OURS = ("#2166ac", "#67a9cf", "#5aae61")
BARS = ("#2166ac", "#5aae61", "#8073ac", "#e08214")
GOAL, PEER, FAINT = "#b2182b", "#444444", "#888888"
PEER_MARKS = ("o", "D", "s", "^", "v", "P", "X")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}


def peers_of(rows: Sequence[Row]) -> dict[str, str]:
    """A mark for each program that one of ``rows`` is held against."""
    names = dict.fromkeys(name for row in rows for name in row.peers)
    return {name: PEER_MARKS[i % len(PEER_MARKS)] for i, name in enumerate(names)}


def draw_share(figure: Any, results: Sequence[Result]) -> list[Result]:
    """A bar a case, its limit over its time; goals and peers on the same scale, the time beside it."""
    chosen = [result for result in results if result.row.share is not None]
    if not chosen:
        return []
    axes = figure.add_subplot()
    peers = peers_of([result.row for result in chosen])
    place, ticks = 0.0, []
    for i, (benchmark, group) in enumerate(groupby(chosen, key=lambda result: result.benchmark)):
        heading = axes.annotate(
            TITLES.get(benchmark, benchmark), (0, place), (4, 0), textcoords="offset points", weight="bold",
            va="center", fontsize=9,
        )  # fmt: skip
        if benchmark in LIMITS:
            axes.annotate(
                f"limit: {LIMITS[benchmark]}", (1, 0.5), (6, 0), xycoords=heading, textcoords="offset points",
                va="center", color=FAINT,
            )  # fmt: skip
        for result in group:
            place += 1
            _draw_bar(axes, place, result.row, BARS[i % len(BARS)], peers)
            ticks.append((place, result.row.case))
        place += 1.4
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 0.6, -0.7)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20), [f"{share} %" for share in range(0, 101, 20)])
    axes.axvline(100, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel("limit of the hardware / time")
    handles = [
        _mark("|", GOAL, "goal", markersize=9, markeredgewidth=2),
        *(_mark(mark, PEER, name, fillstyle="none") for name, mark in peers.items()),
    ]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=min(6, len(handles)))
    figure.set_size_inches(WIDTH, 1.3 + 0.175 * place)
    return chosen


def _draw_bar(axes: Any, place: float, row: Row, colour: str, peers: dict[str, str]) -> None:
    limit = row.limit or 0.0
    axes.barh(place, 100 * (row.share or 0), color=colour, height=0.72)
    axes.text(101, place, f"{figures(row.median or 0)} {unit(row)}", va="center_baseline", fontsize=7.5)
    if row.must is not None:
        at = 100 * limit / row.must
        axes.plot([at, at], [place - 0.42, place + 0.42], color=GOAL, linewidth=2, solid_capstyle="butt")
    for name, time in row.peers.items():
        axes.plot(
            100 * limit / time, place, peers[name], color=PEER, markersize=4, markerfacecolor="white",
            markeredgewidth=0.8,
        )  # fmt: skip


def draw_length(figure: Any, results: Sequence[Result]) -> list[Result]:
    """Time over the tokens of one sequence."""
    return _draw_panels(
        figure, [r for r in results if r.row.sizes.get("sequences") == 1], "length", "tokens of one sequence"
    )


def draw_batch(figure: Any, results: Sequence[Result]) -> list[Result]:
    """Time over the sequences that take a step together."""
    layers = [result for result in results if result.benchmark != "whole"]
    return _draw_panels(figure, layers, "batch", "sequences")


def _draw_panels(figure: Any, results: Sequence[Result], over: str, label: str) -> list[Result]:
    """A panel a benchmark and D, where anything was measured at two sizes or more."""
    panels: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if over in result.row.sizes:
            kind = "" if result.benchmark != "conv" else f" {result.row.sizes.get('form')}"
            panels.setdefault((f"{result.title}{kind}", result.row.sizes.get("D")), []).append(result)
    panels = {
        key: found for key, found in panels.items() if len({result.row.sizes[over] for result in found}) > 1
    }
    if not panels:
        return []
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, ((title, channels), found) in zip(grid, panels.items(), strict=False):
        axes.set_title(title if channels is None else f"{title}, D {channels}")
        _draw_panel(axes, found, over)
        axes.set_xlabel(label)
        axes.set_ylabel(unit(found[0].row))
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.set_size_inches(WIDTH, 0.6 + 3.1 * rows)
    return [result for found in panels.values() for result in found]


def _of_peer(name: str, row: Row) -> float | None:
    return row.peers.get(name)


def _draw_panel(axes: Any, results: Sequence[Result], over: str) -> None:
    """A line for each form of ours; the limit, the goals and the peers, each once."""

    def points(rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[list[Any]]:
        known = {row.sizes[over]: value(row) for row in rows if value(row) is not None}
        return [list(known), list(known.values())]

    rows = sorted((result.row for result in results), key=lambda row: row.sizes[over])
    forms = list(dict.fromkeys(row.sizes.get("form") for row in rows))
    for i, form in enumerate(forms):
        line = [row for row in rows if row.sizes.get("form") == form]
        name = f"ours, {form}" if len(forms) > 1 else "ours"
        axes.plot(
            *points(line, lambda row: row.median), "o-", color=OURS[i % len(OURS)], markersize=5, linewidth=2,
            zorder=3, label=name,
        )  # fmt: skip
    axes.plot(
        *points(rows, lambda row: row.must), "_", color=GOAL, markersize=14, markeredgewidth=2, label="goal"
    )
    axes.plot(*points(rows, lambda row: row.limit), "--", color="black", linewidth=1, label="limit")
    for name, mark in peers_of(rows).items():
        axes.plot(
            *points(rows, partial(_of_peer, name)), marker=mark, color=FAINT, linewidth=0.8,
            markersize=4.5, markerfacecolor="white", label=name,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row.sizes[over] for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.margins(x=0.12)
    _label_values(axes)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend


def _label_values(axes: Any) -> None:
    """Plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark(mark: str, colour: str, label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=mark, color=colour, label=label, linestyle="none", **style)


PLOTS = {
    "share": (draw_share, "Share of the hardware's limit"),
    "length": (draw_length, "Time by length"),
    "batch": (draw_batch, "Time by batch"),
    "whole": (draw_whole, "falcon-mamba-7b as a user gets it"),
}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the plots that ``results`` have something for; returns their paths.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(STYLE):
            for name, (draw_one, title) in PLOTS.items():
                figure = Figure(layout="constrained")
                drawn = draw_one(figure, results)
                if drawn:
                    hardware = dict.fromkeys(result.environment["hardware"] for result in drawn)
                    figure.suptitle(f"{title}, {' and '.join(hardware)}", fontsize=12, weight="bold")
                    figure.supxlabel(source(drawn), color=FAINT, fontsize=7.5)
                    written.append(folder / f"{name}.png")
                    save(figure, written[-1])
    except OSError as failure:
        raise ValueError(f"--out {folder} cannot be written ({failure.strerror}): give a folder") from failure
    return written


def save(figure: Any, path: Path) -> None:
    """Write ``figure`` as a PNG of :data:`SHADES` colours."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=DPI)
    Image.open(whole).convert("RGB").quantize(SHADES).save(path, optimize=True)


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
        written = draw(read(options.results), options.out)
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
