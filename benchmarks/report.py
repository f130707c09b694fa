"""The results of a benchmark: one row per case, as a table to read and as JSON to keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.case import UNITS, Case
from benchmarks.ceilings import H200, Ceilings
from benchmarks.checking import Error
from benchmarks.timing import Samples
from tp_mamba.launch.console import table

PIPED_WIDTH = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case, measured or failed; all times in ``unit``."""

    case: str
    unit: str
    sizes: dict[str, int | str]
    samples: tuple[float, ...] = ()
    """Empty if it failed: an output that is wrong has no time."""
    limit: float | None = None
    must: float | None = None
    stretch: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    work: tuple[float, str] | None = None
    errors: tuple[Error, ...] = ()
    failure: str | None = None
    """Why there are no samples."""

    @classmethod
    def of(
        cls,
        case: Case,
        ceilings: Ceilings | None = None,
        *,
        samples: Samples | None = None,
        errors: Iterable[Error] = (),
        limit: float | None = None,
        failure: str | None = None,
    ) -> Row:
        """The row of ``case``, its limit that of a GPU of these ``ceilings``, or ``limit`` (seconds) if given.

        Raises:
            ValueError: samples of a case that failed its check.
        """
        errors = tuple(errors)
        failure = failure or "; ".join(error.complaint() for error in errors if not error.ok) or None
        if samples is not None and failure is not None:
            raise ValueError(f"{case.name} has samples but failed ({failure}): a wrong output has no time")
        scale = UNITS[case.unit]
        if limit is None and case.limit is not None and ceilings is not None:
            limit = case.limit(ceilings)
        return cls(
            case=case.name,
            unit=case.unit,
            sizes=case.sizes,
            samples=() if samples is None else samples.scaled(scale).values,
            limit=None if limit is None else limit * scale,
            must=case.target.must,
            stretch=case.target.stretch,
            peers=case.target.peers,
            work=case.work,
            errors=errors,
            failure=failure,
        )

    @property
    def median(self) -> float | None:
        return Samples(self.samples).median if self.samples else None

    @property
    def share(self) -> float | None:
        """The limit over the median: 1 is the limit."""
        return self.limit / self.median if self.limit and self.median else None

    @property
    def rate(self) -> float | None:
        """Bytes or tokens per second."""
        return self.work[0] / self.median * UNITS[self.unit] if self.work and self.median else None

    def to_json(self) -> dict[str, Any]:
        """The row with what follows from it, for programs that read it without this one."""
        statistics = None
        if self.samples:
            samples = Samples(self.samples)
            statistics = {
                "median": samples.median,
                "min": samples.least,
                "p90": samples.p90,
                "count": len(self.samples),
            }
        ratios = {name: time / self.median for name, time in self.peers.items()} if self.median else {}
        return asdict(self) | {
            "statistics": statistics,
            "share_of_limit": self.share,
            "times_faster_than": ratios,
            "rate": self.rate,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        """The row that :meth:`to_json` wrote."""
        known = {name: fields[name] for name in cls.__dataclass_fields__}
        return cls(
            **known
            | {
                "samples": tuple(known["samples"]),
                "work": None if known["work"] is None else (known["work"][0], known["work"][1]),
                "errors": tuple(Error(**error) for error in known["errors"]),
            }
        )


def write_json(
    path: Path,
    benchmark: str,
    environment: dict[str, Any],
    ceilings: Ceilings | None,
    seed: int,
    rows: Sequence[Row],
    goals: str = H200.hardware,
) -> None:
    """Write what was measured so far to ``path``; ``ceilings`` are those of its limits, None of a CPU; ``goals`` is the
    GPU that goals are for."""
    content = {
        "benchmark": benchmark,
        "seed": seed,
        "environment": environment,
        "ceilings": None if ceilings is None else asdict(ceilings),
        "goals_and_peers": "see benchmarks/peers.py" if ceilings is None else goals,
        "rows": [row.to_json() for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> tuple[str, dict[str, Any], list[Row]]:
    """``(benchmark, environment, rows)`` of a file that :func:`write_json` wrote.

    Raises:
        ValueError: it is another file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row.from_json(row) for row in content["rows"]]
        return content["benchmark"], content["environment"], rows
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise ValueError(
            f"{path} is no result of these benchmarks ({type(failure).__name__}: {failure}): "
            "give a file that --json wrote"
        ) from failure


def show(rows: Sequence[Row]) -> None:
    """Print the table of ``rows`` to stdout."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(as_table(rows))


def as_table(rows: Sequence[Row]) -> Table:
    """Median, least and 90th percentile beside limit, goals, peers and error; columns without a value left out."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    columns = ["case", "median", "min", "p90", "limit", "of limit", "must", "stretch"]
    columns += [f"vs {name}" for name in peers] + ["rate", "error"]
    cells = [_cells(row, peers) for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    return table([columns[i] for i in kept], [[line[i] for i in kept] for line in cells])


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    if row.failure is not None or row.median is None:
        return [row.case, "FAILED", *[""] * (len(peers) + 7), row.failure or "not measured"]
    samples = Samples(row.samples)
    return [
        row.case,
        f"{figures(row.median)} {row.unit}",
        figures(samples.least),
        figures(samples.p90),
        "" if row.limit is None else figures(row.limit),
        "" if row.share is None else f"{row.share:.0%}",
        _goal(row.must, row.median),
        _goal(row.stretch, row.median),
        *(f"{row.peers[name] / row.median:.2f}x" if name in row.peers else "" for name in peers),
        _rate(row),
        ", ".join(str(error) for error in row.errors),
    ]


def figures(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value == 0:
        return "0"
    digits = 2 if value >= 1 else 3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.{digits}f}"


def _goal(goal: float | None, median: float) -> str:
    return "" if goal is None else f"{figures(goal)} {'met' if median <= goal else 'missed'}"


def _rate(row: Row) -> str:
    if row.rate is None or row.work is None:
        return ""
    if row.work[1] == "bytes":
        return f"{row.rate / 1e12:.2f} TB/s"
    return f"{row.rate:,.0f} {row.work[1]}/s" if row.rate >= 100 else f"{row.rate:.1f} {row.work[1]}/s"
