"""The progress bar of a training run; where stderr is no terminal, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, dict[str, float]], None]

LINE_S = 10.0
"""Seconds between lines, where there is no terminal to draw a bar on."""


@contextmanager
def step_bar(enabled: bool) -> Iterator[Progress | None]:
    """Give a callback ``(step, steps, values)`` that shows how training goes; None if not ``enabled``."""
    if not enabled:
        yield None
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield _lines()


def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    known: dict[str, float] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("")

        def progress(step: int, steps: int, values: dict[str, float]) -> None:
            known.update(values)
            bars.update(task, completed=step, total=steps, description=describe(known))

        yield progress


def _lines() -> Progress:
    known: dict[str, float] = {}
    told = time.monotonic()

    def progress(step: int, steps: int, values: dict[str, float]) -> None:
        nonlocal told
        known.update(values)
        if step == steps or time.monotonic() - told >= LINE_S:
            told = time.monotonic()
            print(f"step {step} of {steps}: {describe(known)}", file=sys.stderr, flush=True)

    return progress


def describe(values: dict[str, float]) -> str:
    """The figures that a person follows, on one line."""
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    if "valid_loss" in values:
        parts.append(f"validation {values['valid_loss']:.4f}")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "share_of_peak" in values:
        parts.append(f"{values['share_of_peak']:.1%} of peak")
    return ", ".join(parts)
