"""What a benchmark is made of: cases, and what one of them becomes once its inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.checking import Error
from benchmarks.limits import Limit
from benchmarks.peers import Target
from benchmarks.timing import Samples

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "x": 1.0}
"""What a table may be in, and how many of it make one of what is measured: seconds, or a ratio (``x``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One case, ready to run."""

    check: Callable[[], Sequence[Error]]
    """Runs it once, on outputs poisoned where they are given, and compares them with float64."""
    measure: Callable[[int], Samples]
    """So many samples of it: seconds per call, or a ratio."""
    limit: float | None = None
    """The least it can take, in seconds, where only a run beside it can tell."""


Build = Callable[[torch.Generator], Workload]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of a table."""

    name: str
    unit: str
    """One of :data:`UNITS`; that of ``target`` too."""
    sizes: dict[str, int | str]
    """What it is about, for plots: ``sequences``, ``tokens``, ``batch``, ``D``, ..."""
    build: Build
    """Draws the inputs, on the generator's device."""
    limit: Limit | None = None
    """The least it can take on a GPU, in seconds."""
    target: Target = field(default_factory=Target)
    work: tuple[float, str] | None = None
    """How much one call does, and of what: ``bytes`` or ``tokens``."""
