"""A linear layer of few rows, as decode has them: the weight is streamed once, at the memory's rate.

    y = x @ weight.T        # x [M, K], M up to 128; summed in float32, rounded once

It stands beside the library's product (``torch.nn.functional.linear``), which reads a weight of few rows, such as
x_proj's, at a small part of the memory's rate, and others at three quarters; :func:`prefers_skinny` says where.

Bits: K is summed in slices of a fixed width, and these in a fixed binary tree (``skinny_linear_launch.py``). A row of
the result depends neither on the other rows nor on their number, and is the same in every run.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.checks import check_device, refuse_grad
from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.linear.launch import (
    MAX_ROWS,
    fills_gpu,
    slice_count,
    slices_launch,
)
from tp_mamba.kernels.linear.reference import skinny_linear_reference, slices_reference

_OP = "skinny_linear"
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_ROWS = {(1, 4096): 32, (1, 8192): 32, (2, 4096): 32, (4, 4096): 32}
"""By programs a multiprocessor and K, of x with a wide weight: others have not been measured."""
_MOST_GROUPS = 32
"""Of slices that the kernel behind a product adds up by itself."""
_ELSEWHERE = "use torch.nn.functional.linear"

torch.library.define("tp_mamba::skinny_linear", "(Tensor x, Tensor weight, ScalarType out_dtype) -> Tensor")
torch.library.define("tp_mamba::skinny_linear_slices", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl("tp_mamba::skinny_linear", ("cpu", "cuda"))
def _skinny_linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if not use_triton(x):
        return skinny_linear_reference(x, weight, out_dtype)
    from tp_mamba.kernels.linear.mixer import launch

    out = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    launch(out, x if x.stride(1) == 1 else x.contiguous(), weight)
    return out


@torch.library.register_fake("tp_mamba::skinny_linear")
def _skinny_linear_fake(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


@torch.library.impl("tp_mamba::skinny_linear_slices", ("cpu", "cuda"))
def _skinny_linear_slices(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (M, K), N = x.shape, weight.shape[0]
    if not use_triton(x):
        return slices_reference(x, weight)
    from tp_mamba.kernels.linear.mixer import launch_product

    cut = slices_launch(M, N, K)
    sums = x.new_empty(cdiv(slice_count(N, K), cut.group), M, N, dtype=torch.float32)
    if sums.numel():
        launch_product(sums, x if x.stride(1) == 1 else x.contiguous(), weight, cut)
    return sums


@torch.library.register_fake("tp_mamba::skinny_linear_slices")
def _skinny_linear_slices_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    N, K = weight.shape
    groups = cdiv(slice_count(N, K), slices_launch(1, N, K).group)
    return x.new_empty(groups, x.shape[0], N, dtype=torch.float32)


def prefers_skinny(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether :func:`skinny_linear` serves ``x [M, K]`` and ``weight [N, K]`` better than cuBLAS on a GPU.

    True where an H200 has shown it (on the projections of falcon-mamba-7b, on one GPU and on one of two):

    - a long K and so few weight rows that cuBLAS leaves most of the GPU idle (x_proj), up to 128 rows with K = 4096 and
      up to 64 with K = 8192;
    - 32 weight rows for each multiprocessor and K = 4096 or 8192 (out_proj), or 64 or 128 of them and K = 4096
      (in_proj of one of two GPUs, and of one), up to 32 rows. With more rows, and for more weight rows, cuBLAS is as
      fast or faster.

    Rows of K that are no multiple of 16 could not be loaded 16 bytes at a time.
    """
    if dtype not in _DTYPES or not 1 <= M <= MAX_ROWS:
        return False
    if N <= 512:
        return K >= 2048 and K % 16 == 0 and (M <= 64 or K <= 4096)
    return any(
        fills_gpu(N, times) and width == K and most >= M for (times, width), most in _MOST_ROWS.items()
    )


def prefers_slices(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether :func:`skinny_linear_slices` serves better than :func:`skinny_linear` where a kernel adds the slices."""
    groups = cdiv(slice_count(N, K), slices_launch(M, N, K).group)
    return N <= 512 and prefers_skinny(M, N, K, dtype) and groups <= _MOST_GROUPS


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x @ weight.T`` for at most 128 rows, summed in float32.

    Args:
        x: ``[M, K]``, M up to 128; bfloat16 or float16. Rows may lie apart; gaps between columns cost a copy of x.
        weight: ``[N, K]`` in the dtype of ``x``; columns contiguous, rows may lie apart.
        out_dtype: dtype of the result, that of ``x`` (default) or float32.

    Returns:
        ``[M, N]`` in ``out_dtype``, contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device.
        RuntimeError: an input requires grad while grad mode is on.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check(x, weight)
    if out_dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{_OP}: out_dtype is {out_dtype} but must be float32 or the dtype of x, {x.dtype}; convert the result"
        )
    return torch.ops.tp_mamba.skinny_linear(x, weight, out_dtype)


def skinny_linear_slices(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The partial sums of :func:`skinny_linear`, for a kernel that adds them up: ``split_dt_bc``.

    Args:
        x, weight: as for :func:`skinny_linear`.

    Returns:
        ``[groups, M, N]`` float32, contiguous: sums over one or two slices of K each, as ``N`` and ``K`` decide. Added
        in an aligned binary tree (``skinny_linear_launch.py``), as ``add_slices`` does, they are
        ``skinny_linear(x, weight, out_dtype=torch.float32)``, on a GPU to the bit.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check(x, weight)
    return torch.ops.tp_mamba.skinny_linear_slices(x, weight)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    inputs = [("x", x), ("weight", weight)]
    if x.dtype not in _DTYPES:
        raise ValueError(f"{_OP}: x has dtype {x.dtype} but must be bfloat16 or float16; {_ELSEWHERE}")
    if weight.dtype != x.dtype:
        raise ValueError(
            f"{_OP}: weight has dtype {weight.dtype} but x has {x.dtype}; convert one of them to the other's"
        )
    check_device(_OP, x.device, "x", inputs)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} but must be [M, K] with at least one column; flatten the rows"
        )
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"{_OP}: x has {x.shape[0]} rows but at most {MAX_ROWS} are taken; {_ELSEWHERE}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{_OP}: weight has shape {list(weight.shape)} but must be [N, K] with K = {x.shape[1]}, as in x; "
            "give it a row an output"
        )
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(
            f"{_OP}: weight has stride {weight.stride(1)} between columns but they must be contiguous; "
            "call contiguous() on it once"
        )
    refuse_grad(_OP, inputs)
