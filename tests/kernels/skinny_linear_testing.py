"""Inputs, plans and fixtures for the tests of products of few rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton_interpreter import repair

from tp_mamba.kernels.linear.launch import slice_count, slice_width

DTYPES = [torch.bfloat16, torch.float16]


DECODE = [(288, 8192), (288, 4096), (4096, 8192), (4096, 4096), (8192, 4096), (16384, 4096)]
"""out, k of falcon-mamba-7b's projections, on one GPU and on one of two."""


def make(M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed + M + N + K)
    return {
        "x": torch.randn(M, K, generator=g).to(dtype),
        "weight": (torch.randn(N, K, generator=g) * K**-0.5).to(dtype),
    }


def assert_float32_sums(actual: torch.Tensor, exact: torch.Tensor, weight: torch.Tensor) -> None:
    """Every step of a chain and of the tree may cut off one unit in the last place, as a tensor core's adder does.

    (Plain float32 is no measure: it rounds to nearest.) A partial sum rounded to 16 bits would err a hundred times
    more.
    """
    N, K = weight.shape
    steps = slice_width(N, K) // 16 + slice_count(N, K).bit_length()
    size = exact.abs() + exact.square().mean().sqrt()
    error = (actual.cpu().double() - exact) / size
    assert error.square().mean().sqrt() <= steps * torch.finfo(torch.float32).eps
    assert error.abs().max() <= 4 * steps * torch.finfo(torch.float32).eps


def multiply_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as integers, and sums in whatever order numpy does.

    Here it sums as the tensor core's instructions do, 16 columns after 16, so that an order can be tested.
    """
    from triton.runtime import interpreter

    repair()  # before this patch: what the patch restores is then repaired
    bf16 = interpreter.tl.bfloat16

    def widened(x: Any) -> Any:
        if x.dtype.scalar != bf16:
            return x.data.astype(np.float64)
        return (x.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def dot(self: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
        wide_a, wide_b, total = widened(a), widened(b), sums.data
        for k in range(0, wide_a.shape[1], 16):
            total = (total + wide_a[:, k : k + 16] @ wide_b[k : k + 16]).astype(np.float32)
        return interpreter.TensorHandle(total, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
