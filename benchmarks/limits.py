"""The least time a computation can take on the hardware of :mod:`benchmarks.peers`; seconds."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks.peers import COPY_BANDWIDTH, EXPONENTIAL_RATE, GEMM_RATE


def by_bytes(count: float, bandwidth: float = COPY_BANDWIDTH) -> float:
    """Every input read once and every output written once, ``count`` bytes in all."""
    return count / bandwidth


def by_exponentials(tokens: int, channels: int, states: int) -> float:
    """A scan's exponentials: one a state, and four for softplus and gate, at every token of every channel."""
    return tokens * channels * (states + 4) / EXPONENTIAL_RATE


def by_flops(count: float) -> float:
    """``count`` floating-point operations of bfloat16 products."""
    return count / GEMM_RATE


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """The elements of ``tensors`` once, in bytes; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
