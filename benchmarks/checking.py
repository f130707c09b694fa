"""Whether outputs are right: their distance from float64, and how much of one is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

FLOAT32_SUMS = 1e-5
"""Allowed on top of rounding: float32 sums of some thousand terms, and approximate exponentials."""


@dataclass(frozen=True, slots=True)
class Error:
    """How far one output is from what it should be."""

    output: str
    norm: float
    """``|actual - exact| / |exact|``"""
    allowed_norm: float
    worst: float
    """``max |actual - exact| / max |exact|``: a few wrong elements do not show in the norm."""
    allowed_worst: float

    @property
    def ok(self) -> bool:
        # NaN compares false, so it never passes.
        return self.norm <= self.allowed_norm and self.worst <= self.allowed_worst

    def __str__(self) -> str:
        return f"{self.output} {self.norm:.1e}"

    def complaint(self) -> str:
        return (
            f"{self.output} is off by {self.norm:.2e} in the norm (allowed {self.allowed_norm:.2e}) and by "
            f"{self.worst:.2e} in the worst element (allowed {self.allowed_worst:.2e})"
        )


def compare(
    output: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    *,
    rounded: torch.Tensor | None = None,
    rounded_exact: torch.Tensor | None = None,
    rounds: float = 2.0,
) -> Error:
    """The error of ``actual`` against the float64 ``exact``.

    Args:
        output: its name.
        actual: any shape and float dtype.
        exact: the same shape in float64.
        rounded: the same output by the reference in the dtypes of the tested code, whose error is the measure of what
            is allowed. None: ``exact`` rounded once to the dtype of ``actual``.
        rounded_exact: what ``rounded`` is held against, where that is not ``exact``.
        rounds: how many times that error is allowed, with :data:`FLOAT32_SUMS` on top.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"{output} has shape {list(actual.shape)} but its reference has {list(exact.shape)}")
    norm, worst = distance(actual, exact)
    if rounded is None:
        allowed_norm, allowed_worst = distance(exact.to(actual.dtype), exact)
    else:
        allowed_norm, allowed_worst = distance(rounded, exact if rounded_exact is None else rounded_exact)
        # The worst of many elements is partly luck: twice as much again, and a few units in the last place.
        allowed_worst = 2 * allowed_worst + 4 * torch.finfo(actual.dtype).eps / rounds
    allowed_norm = rounds * allowed_norm + FLOAT32_SUMS
    allowed_worst = rounds * allowed_worst + 10 * FLOAT32_SUMS
    return Error(output, norm, allowed_norm, worst, allowed_worst)


def worst_of_each(errors: Iterable[Error]) -> list[Error]:
    """One error an output: one that is too large if any is, else the largest."""
    found = {error.output: error for error in sorted(errors, key=lambda error: (not error.ok, error.norm))}
    return list(found.values())


def distance(actual: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """``(|actual - exact| / |exact|, max |actual - exact| / max |exact|)``, in float64."""
    error = actual.to(exact.device, torch.float64) - exact
    tiny = torch.finfo(torch.float64).tiny
    norm = error.norm() / exact.norm().clamp(min=tiny)
    worst = error.abs().max() / exact.abs().max().clamp(min=tiny)
    return float(norm), float(worst)
