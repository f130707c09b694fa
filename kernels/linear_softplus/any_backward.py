"""Triton kernel of ``dv = dout sigmoid(x @ weight.T + bias)`` and of the sums of dv over tokens, for any strides.

A tiled product, as long as its epilogue: dout is requested before the product is taken. Sums over tokens are those of
dv before it is rounded, written per tile, ``[tiles, D]``, and added up by a second kernel in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import sigmoid
from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.dialect import add
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.partial_sums import sum_partials
from tp_mamba.kernels.linear_softplus.launch import backward_plan


@triton.jit(do_not_specialize=["T"])
def _softplus_backward_kernel(
    dv_ptr,  # [T, D] contiguous, any float, out
    partials_ptr,  # [tiles, D] float32, out; or None
    dout_ptr,  # [T, D], any float, in
    x_ptr,  # [T, R], any float, in
    weight_ptr,  # [D, R], as x, in
    bias_ptr,  # [D], any float, in; or None
    T,
    dout_stride_t: tl.int64, dout_stride_d, bias_stride_d,
    # A model has one of each: as constants they fold into the loads and stores.
    x_stride_t: tl.constexpr, x_stride_r: tl.constexpr,
    weight_stride_d: tl.constexpr, weight_stride_r: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    t_mask = first_t + t < T
    d_mask = first_d + d < D
    mask = t_mask[:, None] & d_mask[None, :]
    p_dout = dout_ptr + (first_t + t[:, None]) * dout_stride_t + (first_d + d[None, :]) * dout_stride_d
    dout = tl.load(p_dout, mask=mask, other=0.0)
    x_ptr += first_t * x_stride_t
    weight_ptr += first_d * weight_stride_d
    p_x = x_ptr + t[:, None] * x_stride_t + r[None, :] * x_stride_r
    p_weight = weight_ptr + d[:, None] * weight_stride_d + r[None, :] * weight_stride_r
    v = tl.full([BLOCK_T, BLOCK_D], 0.0, tl.float32)
    for k in range(0, R, BLOCK_R):
        r_mask = (k + r < R)[None, :]
        x = tl.load(p_x + k * x_stride_r, mask=t_mask[:, None] & r_mask, other=0.0)
        weight = tl.load(p_weight + k * weight_stride_r, mask=d_mask[:, None] & r_mask, other=0.0)
        v = tl.dot(x, weight.trans(), v, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + (first_d + d) * bias_stride_d, mask=d_mask, other=0.0).to(tl.float32)
        v = tl.fma(v, 1.0, bias[None, :])
    dv = dout.to(tl.float32) * sigmoid(v)
    if partials_ptr is not None:
        p_partials = partials_ptr + tl.program_id(0).to(tl.int64) * D + first_d + d
        tl.store(p_partials, tl.reduce(dv, 0, add), mask=d_mask)
    p_dv = dv_ptr + (first_t + t[:, None]) * D + first_d + d[None, :]
    tl.store(p_dv, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def launch(
    dv: torch.Tensor,
    dbias: torch.Tensor | None,
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Same contract as ``cpu_backward.linear_softplus_backward_cpu``; ``dv`` is contiguous."""
    (T, R), D = x.shape, weight.shape[0]
    if T == 0 or D == 0:
        if dbias is not None:
            dbias.zero_()
        return
    plan = backward_plan(R, x.dtype)
    tiles = cdiv(T, plan.BLOCK_T)
    partials = None if dbias is None else x.new_empty(tiles, D, dtype=torch.float32)
    # The stride of a single row says nothing: it must not compile a kernel of its own.
    x_stride_t, x_stride_r = x.stride()
    with on_device_of(x):
        _softplus_backward_kernel[(tiles, cdiv(D, plan.BLOCK_D))](
            dv, partials, dout, x, weight, bias, T, *dout.stride(), 0 if bias is None else bias.stride(0),
            R if T == 1 else x_stride_t, x_stride_r, *weight.stride(), D, R,
            BLOCK_T=plan.BLOCK_T, BLOCK_D=plan.BLOCK_D, BLOCK_R=plan.BLOCK_R, num_warps=plan.num_warps,
        )  # fmt: skip
    if dbias is not None and partials is not None:
        sum_partials(dbias, partials)
