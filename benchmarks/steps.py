"""Where the time of an engine's steps goes: by kind of step, on the device and on the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.scheduler import Schedule


@dataclass(slots=True)
class Kind:
    """The steps of one kind, added up; seconds."""

    kind: str
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    """Prompt tokens, and one of each row that decodes."""
    room: int = 0
    """Tokens of what the steps were padded to."""
    forward: float = 0.0
    """From the forward pass's first kernel to its last, waits for the host among them included."""
    between: float = 0.0
    """From there to the next forward pass: tokens chosen, and nothing to do."""
    launching: float = 0.0
    """Of the host, to launch forward passes."""


@dataclass(frozen=True, slots=True)
class _Step:
    kind: str
    rows: int
    tokens: int
    room: int
    began: float | torch.cuda.Event
    ended: float | torch.cuda.Event
    launching: float


class StepClock:
    """Counts and times the forward passes of an engine that has started.

    It costs two events a step.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine._steps is not None, "start the engine first"
        runner = engine._steps._runner
        self._graphs, self._forward = runner._graphs, runner.forward
        self._on_gpu = engine._model.device.type == "cuda"
        self._steps: list[_Step] = []
        runner.forward = self._timed  # type: ignore[method-assign]

    def _stamp(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, schedule: Schedule) -> torch.Tensor:
        rows = len(schedule.decodes) + len(schedule.chunks)
        tokens = len(schedule.decodes) + sum(chunk.length for chunk in schedule.chunks)
        kind, rung = "prompts" if schedule.chunks else "decode", None
        if self._graphs is not None:
            rung = self._graphs.ladder.for_step(tokens, rows, decodes=not schedule.chunks)
            kind += ", eager" if rung is None else ", captured"
        began, host = self._stamp(), time.perf_counter()
        logits = self._forward(schedule)
        launching = time.perf_counter() - host
        room = tokens if rung is None else rung.tokens
        self._steps.append(_Step(kind, rows, tokens, room, began, self._stamp(), launching))
        return logits

    def read(self) -> list[dict[str, Any]]:
        """The steps since the last call, kind by kind; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        kinds: dict[str, Kind] = {}
        for step in self._steps:
            found = kinds.setdefault(step.kind, Kind(step.kind))
            found.steps += 1
            found.rows += step.rows
            found.tokens += step.tokens
            found.room += step.room
            found.forward += _seconds(step.began, step.ended)
            found.launching += step.launching
        for step, following in pairwise(self._steps):
            kinds[step.kind].between += _seconds(step.ended, following.began)
        self._steps = []
        return [asdict(kind) for kind in kinds.values()]


def _seconds(start: Any, end: Any) -> float:
    return 1e-3 * start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else end - start


def table_of(kinds: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of :meth:`StepClock.read`, for people."""
    columns = (
        "steps",
        "count",
        "rows a step",
        "tokens",
        "padding",
        "forward s",
        "between s",
        "host launching s",
    )
    return columns, [
        (
            kind["kind"],
            f"{kind['steps']}",
            f"{kind['rows'] / kind['steps']:.1f}",
            f"{kind['tokens']:,}",
            f"{kind['room'] / kind['tokens'] - 1:.0%}",
            *(f"{kind[name]:.3f}" for name in ("forward", "between", "launching")),
        )
        for kind in kinds
    ]
