"""The backward of the products: with ``y = x @ weight.T``, ``dx = dy @ weight`` and ``dweight = dy.T @ x``.

Both are the library's products. On a GPU 16-bit operands are multiplied as they are, with sums in float32, and a dy in
float32 is first rounded to their dtype, which errs no more than the rounding of the result. On a CPU everything is
multiplied in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.dtypes import HALVES, wide_dtype
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.linear.launch import slice_count, slice_width


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What the gradients of a product of ``x`` are multiplied in."""
    return x.dtype if use_triton(x) and x.dtype in HALVES else wide_dtype(x.dtype)


def product_gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``(dx, dweight)`` of ``y = x @ weight.T``, each where ``wanted`` says so, in the dtypes of x and weight.

    Args:
        dy: ``[M, out]`` in any float dtype.
        x: ``[M, k]``.
        weight: ``[out, k]`` in the dtype of x.
        wanted: as ``ctx.needs_input_grad`` begins: of x, of weight.
    """
    dtype = product_dtype(x)
    dy = dy.to(dtype)
    dx = torch.mm(dy, weight.to(dtype)).to(x.dtype) if wanted[0] else None
    dweight = torch.mm(dy.t(), x.to(dtype)).to(weight.dtype) if wanted[1] else None
    return dx, dweight


def save_product(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.others = len(inputs) - 2


def linear_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return *product_gradients(dy, x, weight, ctx.needs_input_grad), *(None,) * ctx.others


def slices_gradients(ctx: Any, dsums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of sums over slices of k, ``dsums [groups, M, out]``, of which each has its own columns."""
    x, weight = ctx.saved_tensors
    out_size, k = weight.shape
    width = slice_width(out_size, k) * cdiv(slice_count(out_size, k), len(dsums))
    columns = zip(dsums, x.split(width, 1), weight.split(width, 1), strict=True)
    pairs = [product_gradients(dy, x_k, weight_k, ctx.needs_input_grad) for dy, x_k, weight_k in columns]
    joined = [[part for part in parts if part is not None] for parts in zip(*pairs, strict=True)]
    return tuple(torch.cat(parts, 1) if parts else None for parts in joined)
