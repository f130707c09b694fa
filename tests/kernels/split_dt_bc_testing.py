"""Inputs for the tests of dt, B and C cut out of x_proj's output."""

from __future__ import annotations

from typing import Any

import torch

EPS = 1e-6


def make(
    T: int, R: int, N: int, dtype: torch.dtype = torch.float32, weighted: bool = False
) -> dict[str, Any]:
    """Rows of very different size, some far below eps; weights of several dtypes, one of them strided."""
    g = torch.Generator().manual_seed(T + R + N)
    inputs: dict[str, Any] = {
        "x": (torch.randn(T, R + 2 * N, generator=g) * torch.logspace(-4, 2, T)[:, None]).to(dtype),
        "time_step_rank": R,
        "state_size": N,
    }
    if weighted:
        inputs["dt_weight"] = torch.rand(R, generator=g).bfloat16() + 0.5
        inputs["b_weight"] = torch.rand(2 * N, generator=g)[::2] + 0.5
        inputs["c_weight"] = torch.rand(N, generator=g) - 2
    return inputs


def in_slices(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """The same call with x as ``count`` slices, of rows of very different size too."""
    g = torch.Generator().manual_seed(count)
    slices = torch.randn(count, *inputs["x"].shape, generator=g, dtype=inputs["x"].dtype)
    return inputs | {"x": slices * inputs["x"].abs().amax(dim=1, keepdim=True)}
