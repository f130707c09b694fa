"""``x @ weight.T + bias`` by the routine that serves the shape best.

On a GPU that is the library's product (``torch.nn.functional.linear``), or for few rows, as decode has them, a kernel
that streams the weight once at the memory's rate; :func:`prefers_skinny` says where. On a CPU it is the library's
product, and for one or two rows of float32 a batch of blocks (``cpu.py``).

Bits: in the kernel k is summed in slices of a fixed width, and these in a fixed binary tree (``launch.py``). A row of
the result depends neither on the other rows nor on their number, and is the same in every run. (The library may choose
by the number of rows.) With a gradient to track the same products are taken, so that training computes the bits of
inference; the gradients are the library's products (``backward.py``).

Letters: ``x [M, k]``, M rows; ``weight [out, k]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.checks import check_device
from tp_mamba.kernels.common.device import device_properties
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.dtypes import HALVES
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered
from tp_mamba.kernels.common.static_operands import declare_static_operands
from tp_mamba.kernels.linear import backward
from tp_mamba.kernels.linear.cpu import linear_by_blocks, prefers_blocks, skinny_linear_cpu, slices_cpu
from tp_mamba.kernels.linear.launch import (
    MAX_ROWS,
    prefers_skinny,
    prefers_slices,
    slice_width,
    slices_plan,
    sums_per_product,
)

__all__ = [
    "linear",
    "linear_partial",
    "prefers_skinny",
    "prefers_slices",
    "skinny_linear",
    "skinny_linear_slices",
]

_OP = "skinny_linear"
_ELSEWHERE = "use torch.nn.functional.linear"


def _skinny_linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    if use_triton(x):
        from tp_mamba.kernels.linear.mixer import launch

        launch(out, x if x.stride(1) == 1 else x.contiguous(), weight)
    else:
        skinny_linear_cpu(out, x, weight)
    return out


def _skinny_linear_slices(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (M, k), out_size = x.shape, weight.shape[0]
    sums = torch.empty(sums_per_product(out_size, k), M, out_size, dtype=torch.float32, device=x.device)
    if M == 0 or out_size == 0:
        return sums
    plan = slices_plan(M, out_size, k)
    if use_triton(x):
        from tp_mamba.kernels.linear.mixer import launch_product

        launch_product(sums, x if x.stride(1) == 1 else x.contiguous(), weight, plan)
    else:
        slices_cpu(sums, x, weight, slice_width(out_size, k) * plan.group)
    return sums


def _linear_float32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return F.linear(x.float(), weight.float())
    # The GEMM accumulates in float32 anyway; this keeps its result from being rounded on the way out.
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


torch.library.define("tp_mamba::linear_float32", "(Tensor x, Tensor weight) -> Tensor")
torch.library.define("tp_mamba::skinny_linear", "(Tensor x, Tensor weight, ScalarType out_dtype) -> Tensor")
torch.library.define("tp_mamba::skinny_linear_slices", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("tp_mamba::linear_float32", ("cpu", "cuda"), _linear_float32)
torch.library.impl("tp_mamba::skinny_linear", ("cpu", "cuda"), _skinny_linear)
torch.library.impl("tp_mamba::skinny_linear_slices", ("cpu", "cuda"), _skinny_linear_slices)
declare_static_operands("tp_mamba::skinny_linear", "weight")


@torch.library.register_fake("tp_mamba::linear_float32")
def _linear_float32_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.register_fake("tp_mamba::skinny_linear")
def _skinny_linear_fake(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


@torch.library.register_fake("tp_mamba::skinny_linear_slices")
def _skinny_linear_slices_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out_size, k = weight.shape
    return x.new_empty(sums_per_product(out_size, k), x.shape[0], out_size, dtype=torch.float32)


for _op, _gradients in (
    ("linear_float32", backward.linear_gradients),
    ("skinny_linear", backward.linear_gradients),
    ("skinny_linear_slices", backward.slices_gradients),
):
    torch.library.register_autograd(f"tp_mamba::{_op}", _gradients, setup_context=backward.save_product)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``: the same arguments, results up to rounding, gradients and errors.

    Args:
        x: ``[..., k]``.
        weight: ``[out, k]``.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]``, contiguous.
    """
    if bias is None and _takes_kernel(x, weight):
        return _by_kernel(x, weight, x.dtype)
    if prefers_blocks(x, weight, bias):
        return linear_by_blocks(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_partial(
    x: torch.Tensor, weight: torch.Tensor, *, in_float32: bool = False, in_slices: bool = False
) -> torch.Tensor:
    """One term of a product whose inner dimension is cut over ranks: ``x @ weight.T``, perhaps in slices.

    Args:
        x: ``[..., k]``.
        weight: ``[out, k]``.
        in_float32: results of 16-bit operands leave in float32, not rounded to the dtype of ``x`` on the way.
        in_slices: with ``in_float32``, the sums over slices of k may be left to the next kernel, for whom
            ``split_dt_bc`` adds them up: they are where that is faster, and ``x`` is ``[M, k]``.

    Returns:
        The term ``[..., out]``; or, one dimension more than ``x``, ``[slices, M, out]`` in float32, to be added in an
        aligned binary tree (``launch.py``).
    """
    if not (in_float32 and x.dtype.itemsize < 4):
        return linear(x, weight)
    if not _has_kernel(x, weight):
        return linear(x.float(), weight.float())  # mm's out_dtype serves GPUs alone
    if _takes_kernel(x, weight):
        if in_slices and x.dim() == 2 and _takes_slices(x, weight):
            op = (
                _skinny_linear_slices
                if calls_directly(x, weight)
                else torch.ops.tp_mamba.skinny_linear_slices
            )
            return op(x, weight)
        return _by_kernel(x, weight, torch.float32)
    product = _linear_float32 if calls_directly(x, weight) else torch.ops.tp_mamba.linear_float32
    y = product(x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], weight.shape[0])


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GPU computes this."""
    return x.is_cuda and x.dtype == weight.dtype


def _takes_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this is a well-formed product of few rows that our kernel serves best."""
    if not _has_kernel(x, weight) or weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    out_size, k = weight.shape
    if k == 0 or weight.stride(1) != 1 or x.device != weight.device:
        return False
    return _prefers(prefers_skinny, x.numel() // k, out_size, k, x.dtype, _sm_count(x.device))


def _takes_slices(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return _prefers(prefers_slices, x.shape[0], *weight.shape, x.dtype, _sm_count(x.device))


@remembered
def _prefers(rule: Callable[..., bool], *call: Any) -> bool:
    return rule(*call)


def _sm_count(device: torch.device) -> int:
    return device_properties(device).sm_count


# What torch.compiler.assume_constant_result does, which would import the whole compiler: half of our import time.
_sm_count._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _by_kernel(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """``x [..., k] @ weight.T`` for what :func:`_takes_kernel`."""
    op = _skinny_linear if calls_directly(x, weight) else torch.ops.tp_mamba.skinny_linear
    if x.dim() == 2:
        return op(x, weight, out_dtype)
    return op(x.reshape(-1, x.shape[-1]), weight, out_dtype).view(*x.shape[:-1], weight.shape[0])


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x @ weight.T`` for at most 128 rows, summed in float32.

    Args:
        x: ``[M, k]``, M up to 128; bfloat16 or float16. Rows may lie apart; gaps between columns cost a copy of x.
        weight: ``[out, k]`` in the dtype of ``x``; columns contiguous, rows may lie apart.
        out_dtype: dtype of the result, that of ``x`` (default) or float32.

    Returns:
        ``[M, out]`` in ``out_dtype``, contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check(x, weight)
    if out_dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{_OP}: out_dtype is {out_dtype} but must be float32 or the dtype of x, {x.dtype}; convert the result"
        )
    op = _skinny_linear if calls_directly(x, weight) else torch.ops.tp_mamba.skinny_linear
    return op(x, weight, out_dtype)


def skinny_linear_slices(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The partial sums of :func:`skinny_linear`, for a kernel that adds them up: ``split_dt_bc``.

    Args:
        x, weight: as for :func:`skinny_linear`.

    Returns:
        ``[groups, M, out]`` float32, contiguous: sums over one or two slices of k each, as the weight's shape decides.
        Added in an aligned binary tree (``launch.py``) they are ``skinny_linear(x, weight, out_dtype=torch.float32)``,
        on a GPU to the bit.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device.
    """
    _check(x, weight)
    op = _skinny_linear_slices if calls_directly(x, weight) else torch.ops.tp_mamba.skinny_linear_slices
    return op(x, weight)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    _check_forms(key_of(x), key_of(weight))
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(
            f"{_OP}: weight has stride {weight.stride(1)} between columns but they must be contiguous; "
            "call contiguous() on it once"
        )


@remembered
def _check_forms(x_key: Key, weight_key: Key) -> None:
    x, weight = Form(*x_key), Form(*weight_key)
    if x.dtype not in HALVES:
        raise ValueError(f"{_OP}: x has dtype {x.dtype} but must be bfloat16 or float16; {_ELSEWHERE}")
    if weight.dtype != x.dtype:
        raise ValueError(
            f"{_OP}: weight has dtype {weight.dtype} but x has {x.dtype}; convert one of them to the other's"
        )
    check_device(_OP, x.device, "x", forms(weight=weight_key))
    if len(x.shape) != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} but must be [M, k] with at least one column; flatten the rows"
        )
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"{_OP}: x has {x.shape[0]} rows but at most {MAX_ROWS} are taken; {_ELSEWHERE}")
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{_OP}: weight has shape {list(weight.shape)} but must be [out, k] with k = {x.shape[1]}, as in x; "
            "give it one row per output"
        )
