"""Inputs for the tests of the causal convolution."""

from __future__ import annotations

import itertools

import torch


def randn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).mul(2).to(dtype).to(device)


def starts_of(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def weights(
    D: int, K: int, bias: bool, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return randn(D, K, dtype=dtype, device=device), randn(D, dtype=dtype, device=device) if bias else None


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


def token_major(T: int, D: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """[D, T] whose channels are contiguous, in rows twice as wide: the x half of in_proj's output."""
    return randn(T, 2 * D, dtype=dtype, device=device)[:, :D].t()
