"""The least time a computation can take on a GPU of given :class:`Ceilings`; seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks.ceilings import Ceilings

Limit = Callable[[Ceilings], float]


def by_bytes(count: float) -> Limit:
    """Every input read once and every output written once, ``count`` bytes in all, at the rate of a copy."""
    return lambda gpu: count / gpu.bandwidth


def by_bytes_of_a_step(count: float) -> Limit:
    """The same at the rate to which decode is held."""
    return lambda gpu: count / gpu.step_bandwidth


def by_exponentials(tokens: int, channels: int, states: int) -> Limit:
    """A scan's exponentials: one per state, and four for softplus and gate, at every token of every channel."""
    return lambda gpu: tokens * channels * (states + 4) / gpu.exponentials


def by_flops(count: float) -> Limit:
    """``count`` floating-point operations of bfloat16 products."""
    return lambda gpu: count / gpu.products


def side_by_side(*limits: Limit) -> Limit:
    """The limit of what runs at the same time: the longest of ``limits``."""
    return lambda gpu: max(limit(gpu) for limit in limits)


def in_turn(*limits: Limit) -> Limit:
    """The limit of what runs one after the other: the sum of ``limits``."""
    return lambda gpu: sum(limit(gpu) for limit in limits)


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """The elements of ``tensors`` once, in bytes; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
