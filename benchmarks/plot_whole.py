"""The plot of a whole model: how near to its limit a step comes by batch, and one GPU against two by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.recorded import Result
from benchmarks.report import Row

COLOURS = {1: "#2166ac", 2: "#5aae61"}
NAMES = {1: "one GPU", 2: "two GPUs"}


def draw_whole(figure: Any, results: Sequence[Result]) -> list[Result]:
    """Two panels, of what a user gets; a bare replay beside it is faint."""
    chosen = [result for result in results if result.benchmark == "whole"]
    if not chosen:
        return []
    rows = [result.row for result in chosen]
    share, rate = figure.subplots(1, 2)

    share.set_title("a token of each sequence: share of the limit")
    _lines(
        share,
        rows,
        "batch",
        "as generate",
        lambda row: 100 * (row.share or 0),
        {"linewidth": 2, "marker": "o"},
    )
    _lines(share, rows, "batch", "replay", lambda row: 100 * (row.share or 0), {"linestyle": ":"})
    for row in rows:
        if "batch" in row.sizes and row.sizes["form"] == "as generate" and row.median is not None:
            share.annotate(
                f"{row.median:.2f} ms", (row.sizes["batch"], 100 * (row.share or 0)), (0, 6),
                textcoords="offset points", ha="center", fontsize=7,
            )  # fmt: skip
    share.set_ylim(0, 105)
    share.axhline(100, color="black", linewidth=0.8)
    share.set_ylabel("bytes at the rate of a copy / time, %")
    share.set_xlabel("sequences")

    rate.set_title("a prompt: tokens a second")
    _lines(rate, rows, "length", "as generate", lambda row: row.rate or 0, {"linewidth": 2, "marker": "o"})
    _lines(rate, rows, "length", "as generate", _limit_rate, {"linestyle": "--", "linewidth": 0.8}, "limit, ")
    one = _by_size(rows, "length", "as generate", 1)
    for length, row in _by_size(rows, "length", "as generate", 2).items():
        alone = one[length].rate if length in one else None
        if alone and row.rate:
            rate.annotate(
                f"{row.rate / alone:.2f} times one", (length, row.rate), (0, 7),
                textcoords="offset points", ha="center", fontsize=7,
            )  # fmt: skip
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    rate.set_xlabel("tokens of one prompt")

    for axes, over in ((share, "batch"), (rate, "length")):
        axes.set_xscale("log", base=2)
        sizes = sorted({int(row.sizes[over]) for row in rows if over in row.sizes})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.margins(x=0.15)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right" if over == "length" else "lower left")
    figure.set_size_inches(8.0, 3.8)
    return chosen


def _limit_rate(row: Row) -> float:
    return (row.rate or 0) / (row.share or 1)


def _by_size(rows: Sequence[Row], over: str, form: str, gpus: int) -> dict[int, Row]:
    found = {
        int(row.sizes[over]): row
        for row in rows
        if over in row.sizes and row.sizes["form"] == form and row.sizes["GPUs"] == gpus
    }
    return dict(sorted(found.items()))


def _lines(
    axes: Any,
    rows: Sequence[Row],
    over: str,
    form: str,
    value: Callable[[Row], float],
    style: dict[str, Any],
    prefix: str = "",
) -> None:
    """A line for one GPU and one for two."""
    for gpus, colour in COLOURS.items():
        found = _by_size(rows, over, form, gpus)
        if found:
            name = prefix + NAMES[gpus] + (", replay" if form == "replay" else "")
            axes.plot(list(found), [value(row) for row in found.values()], color=colour, label=name, **style)
