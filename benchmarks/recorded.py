"""Recorded results put together from several files: of a case that was run twice, the newest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.case import UNITS
from benchmarks.report import Row, read_json

TITLES = {
    "scan": "selective scan",
    "scan_backward": "selective scan, backward",
    "conv": "causal convolution",
    "state_update": "state update",
    "norm": "norms",
    "gemm": "projections",
    "layer": "mixer layer, prefill",
    "decode": "mixer layer, decode",
    "collectives": "sums over two GPUs",
    "whole": "falcon-mamba-7b",
    "long": "long input",
    "trace": "requests",
    "prefix": "prompts that begin alike",
    "cpu": "mamba-130m on a CPU",
}
"""What a benchmark measures, in the order in which results are shown."""


class Result(NamedTuple):
    """One row, the benchmark that it is of, and where it was measured."""

    benchmark: str
    row: Row
    environment: dict[str, Any]

    @property
    def title(self) -> str:
        return TITLES.get(self.benchmark, self.benchmark)

    def seconds(self, value: float) -> float:
        return value / UNITS[self.row.unit]


def read(paths: Iterable[Path]) -> list[Result]:
    """Every case that has a time, benchmark by benchmark, each from the newest file that has it.

    Raises:
        ValueError: a file is no result.
    """
    files = sorted((read_json(path) for path in paths), key=lambda file: file[1]["date"])
    newest: dict[tuple[str, str, str], Result] = {}
    for benchmark, environment, rows in files:
        for row in rows:
            if row.median is not None:
                newest[environment["hardware"], benchmark, row.case] = Result(benchmark, row, environment)
    order = list(TITLES)
    return sorted(
        newest.values(), key=lambda r: order.index(r.benchmark) if r.benchmark in order else len(order)
    )


def source(results: Sequence[Result]) -> str:
    """Where ``results`` come from: hardware, versions, dates and commits."""
    machines: dict[str, dict[str, list[str]]] = {}
    for environment in (result.environment for result in results):
        on = (
            f"{environment['threads']} threads"
            if environment["threads"]
            else f"Triton {environment['triton']}"
        )
        days = machines.setdefault(f"{environment['hardware']}, {on}, torch {environment['torch']}", {})
        commits = days.setdefault(environment["date"][:10], [])
        commit = (environment["commit"] or "unknown")[:12]
        if commit not in commits:
            commits.append(commit)
    return "; ".join(
        ", ".join(
            [machine, *(f"{day} (commit {' and '.join(commits)})" for day, commits in sorted(days.items()))]
        )
        for machine, days in machines.items()
    )


def unit(row: Row) -> str:
    """The unit of ``row`` as it is written."""
    return {"us": "µs"}.get(row.unit, row.unit)
