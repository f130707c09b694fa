"""Triton kernels of ``softplus(x @ weight.T + bias)``.

A time step rank of at most 256 makes a short product: per output there are as many cycles of softplus as of tensor
core. So the kernel for many tokens keeps 128 rows of ``weight`` in shared memory, streams tiles of ``x`` past them
with the next tile loading, and leaves room for a second program on the multiprocessor: one multiplies while the
other takes the softplus. Few tokens, float32 and larger ranks run a plain tiled product.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import softplus_of_sum
from tp_mamba.kernels.common.dependent_launch import (
    early_start,
    let_next_start,
    wait_for_kernel_ahead,
)
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2

DECODE_TOKENS = 64
"""Up to here the call is bound by reading ``weight``: small tiles, so that every multiprocessor reads."""

FEW_OUTPUTS = 1 << 21
"""Up to here a program that keeps its rows of ``weight`` would see too few tiles for them to pay."""


class Shape(NamedTuple):
    """How a call is cut: a program computes ``tiles`` tiles ``[BLOCK_T, BLOCK_D]``, ``BLOCK_R`` products at a time."""

    streaming: bool
    BLOCK_T: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int
    tiles: int = 1


def launch_shape(T: int, D: int, R: int, dtype: torch.dtype, processors: int) -> Shape:
    """The cut for ``T`` tokens, ``D`` channels and rank ``R`` on a GPU of ``processors`` multiprocessors.

    Of ``T`` only the class (decode, few tokens, prefill) decides what is compiled and how a row is computed; ``tiles``
    is an argument at run time.
    """
    whole = max(16, next_power_of_2(R))
    if dtype == torch.float32:  # no tensor core without TF32
        return Shape(False, 16, 32, 32, 4) if T <= DECODE_TOKENS else Shape(False, 64, 64, 32, 4)
    if T <= DECODE_TOKENS:
        return Shape(False, 16 if T <= 16 else 32, 32 if D >= 4096 else 16, min(whole, 512), 4)
    if whole > 256:  # the rows of weight leave no room for a second program
        return Shape(False, 128, 128, 64, 8)
    if T * D <= FEW_OUTPUTS:
        return Shape(False, 64, 32, whole, 4)
    block_t, block_d = 64, 128  # T > 64: there is at least one whole tile
    tiles, columns = cdiv(T, block_t), cdiv(D, block_d)
    runs = max(1, 2 * processors // columns)  # two programs a multiprocessor, all at once
    return Shape(True, block_t, block_d, whole, 4, cdiv(tiles, runs))


@triton.jit(do_not_specialize=["T", "tiles"])
def _streaming_kernel(
    out_ptr,  # [T, D] contiguous, written
    x_ptr,  # [T, R], bfloat16 or float16
    weight_ptr,  # [D, R], as x
    bias_ptr,  # [D] contiguous, any float, or None
    T,  # at least BLOCK_T
    tiles,
    # A model has one of each: as constants they fold into the loads and stores.
    x_stride_t: tl.constexpr, x_stride_r: tl.constexpr,
    weight_stride_d: tl.constexpr, weight_stride_r: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_kernel_ahead(PDL)
    first_t = tl.program_id(0).to(tl.int64) * tiles * BLOCK_T
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    d_mask = first_d + d < D
    r_mask = r < R

    weight = tl.load(
        weight_ptr + first_d * weight_stride_d + d[:, None] * weight_stride_d + r[None, :] * weight_stride_r,
        mask=d_mask[:, None] & r_mask[None, :],
        other=0.0,
    ).trans()
    bias = tl.full([BLOCK_D], 0.0, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_d + d, mask=d_mask, other=0.0).to(tl.float32)

    # The last tile is moved up to end at T: the rows that it shares are written twice, with the same bits, and no
    # row needs a mask.
    last_t = (T - BLOCK_T).to(tl.int64)
    x_tile = x_ptr + t[:, None] * x_stride_t + r[None, :] * x_stride_r
    out_tile = out_ptr + first_d + t[:, None] * D + d[None, :]
    x = tl.load(x_tile + tl.minimum(first_t, last_t) * x_stride_t, mask=r_mask[None, :], other=0.0)
    for i in tl.range(
        0, tl.minimum(tiles, (T - first_t + BLOCK_T - 1) // BLOCK_T).to(tl.int32), num_stages=1
    ):
        this_t = tl.minimum(first_t + i * BLOCK_T, last_t)
        # Into registers: a second tile of x in shared memory would leave no room for a second program.
        next_x = tl.load(
            x_tile + tl.minimum(this_t + BLOCK_T, last_t) * x_stride_t, mask=r_mask[None, :], other=0.0
        )
        out = softplus_of_sum(tl.dot(x, weight), bias).to(out_ptr.dtype.element_ty)
        if D % BLOCK_D == 0:
            tl.store(out_tile + this_t * D, out)
        else:
            tl.store(out_tile + this_t * D, out, mask=d_mask[None, :])
        x = next_x


@triton.jit(do_not_specialize=["T"])
def _tiled_kernel(
    out_ptr,  # [T, D] contiguous, written
    x_ptr,  # [T, R], any float
    weight_ptr,  # [D, R], as x
    bias_ptr,  # [D] contiguous, any float, or None
    T,
    x_stride_t: tl.constexpr, x_stride_r: tl.constexpr,
    weight_stride_d: tl.constexpr, weight_stride_r: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    t_mask = first_t + t < T
    d_mask = first_d + d < D

    x_ptr += first_t * x_stride_t
    weight_ptr += first_d * weight_stride_d
    let_next_start(PDL)
    bias = tl.full([BLOCK_D], 0.0, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_d + d, mask=d_mask, other=0.0).to(tl.float32)
    x_tile = x_ptr + t[:, None] * x_stride_t + r[None, :] * x_stride_r
    weight_tile = weight_ptr + d[:, None] * weight_stride_d + r[None, :] * weight_stride_r
    total = tl.full([BLOCK_T, BLOCK_D], 0.0, tl.float32)
    if R <= BLOCK_R:
        r_mask = (r < R)[None, :]
        weight = tl.load(weight_tile, mask=d_mask[:, None] & r_mask, other=0.0)
        wait_for_kernel_ahead(PDL)
        x = tl.load(x_tile, mask=t_mask[:, None] & r_mask, other=0.0)
        total = tl.dot(x, weight.trans(), total, input_precision="ieee")
    else:
        wait_for_kernel_ahead(PDL)
        for k in range(0, R, BLOCK_R):
            r_mask = (k + r < R)[None, :]
            x = tl.load(x_tile + k * x_stride_r, mask=t_mask[:, None] & r_mask, other=0.0)
            weight = tl.load(weight_tile + k * weight_stride_r, mask=d_mask[:, None] & r_mask, other=0.0)
            total = tl.dot(x, weight.trans(), total, input_precision="ieee")
    out = softplus_of_sum(total, bias).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + first_t * D + first_d + t[:, None] * D + d[None, :],
        out,
        mask=t_mask[:, None] & d_mask[None, :],
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write ``softplus(x @ weight.T + bias)`` to ``out [T, D]``, contiguous; arguments as the op's."""
    (T, R), D = x.shape, weight.shape[0]
    if out.numel() == 0:
        return
    shape = launch_shape(T, D, R, x.dtype, _processors(x.device))
    # The stride of a single row says nothing: it must not compile a kernel of its own.
    sizes = (R if T == 1 else x.stride(0), x.stride(1), *weight.stride(), D, R)
    blocks = {name: getattr(shape, name) for name in ("BLOCK_T", "BLOCK_D", "BLOCK_R", "num_warps")}
    options = early_start(x.device)
    grid = (cdiv(T, shape.BLOCK_T * shape.tiles), cdiv(D, shape.BLOCK_D))
    with torch.cuda.device_of(x):
        if shape.streaming:
            _streaming_kernel[grid](out, x, weight, bias, T, shape.tiles, *sizes, **blocks, **options)
        else:
            _tiled_kernel[grid](out, x, weight, bias, T, *sizes, **blocks, **options)
