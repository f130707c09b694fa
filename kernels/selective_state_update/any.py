"""One token of the selective scan for a batch of state slots, for any layout: heads, groups, any N and strides.

A program runs the scan's own :func:`ssm_token` on one (row, head, block of channels), so that decoding continues a
prefill bit for bit.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton.language as tl

from tp_mamba.kernels.common.approximations import LOG2_E
from tp_mamba.kernels.common.dialect import jit_by_type
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.common.recurrence import ssm_token
from tp_mamba.kernels.selective_state_update.launch import any_plan


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def _selective_state_update_kernel(
    state_ptr,  # [slots, heads, D, N], in and out
    x_ptr,  # [B, heads, D], any float, in
    dt_ptr,  # as x
    z_ptr,  # as x, or None
    out_ptr,  # as x, out
    A_ptr,  # [heads, D, N]
    B_ptr,  # [B, G, N]
    C_ptr,  # [B, G, N]
    D_ptr,  # [heads, D] or None
    dt_bias_ptr,  # [heads, D] or None
    state_batch_indices_ptr,  # [B] int, or None: slot b for row b
    channels: tl.int32,  # a head
    group_size: tl.int32,  # channels, over all heads, that share one B and C
    pad_slot_id: tl.int64,
    state_stride_s: tl.int64, state_stride_h: tl.int64, state_stride_d: tl.int64, state_stride_n: tl.int64,
    x_stride_b: tl.int64, x_stride_h: tl.int64, x_stride_d: tl.int64,
    dt_stride_b: tl.int64, dt_stride_h: tl.int64, dt_stride_d: tl.int64,
    z_stride_b: tl.int64, z_stride_h: tl.int64, z_stride_d: tl.int64,
    out_stride_b: tl.int64, out_stride_h: tl.int64, out_stride_d: tl.int64,
    A_stride_h: tl.int64, A_stride_d: tl.int64, A_stride_n: tl.int64,
    B_stride_b: tl.int64, B_stride_g: tl.int64, B_stride_n: tl.int64,
    C_stride_b: tl.int64, C_stride_g: tl.int64, C_stride_n: tl.int64,
    D_stride_h: tl.int64, D_stride_d: tl.int64, bias_stride_h: tl.int64, bias_stride_d: tl.int64,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,  # x, dt, z and out all have channel stride 1
    ONE_GROUP: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    d_mask = d < channels
    nd_mask = (n < N) & d_mask[None, :]
    if TOKEN_MAJOR:
        x_stride_d, dt_stride_d, z_stride_d, out_stride_d = 1, 1, 1, 1

    # A padded row reads no state, writes none, and stores zeros.
    slot = i_b
    live = True
    if HAS_SLOTS:
        slot = tl.load(state_batch_indices_ptr + i_b).to(tl.int64)
        live = slot != pad_slot_id
    state_ptr += (
        slot * state_stride_s + i_h * state_stride_h + d[None, :] * state_stride_d + n * state_stride_n
    )
    h = tl.load(state_ptr, mask=nd_mask & live, other=0.0).to(tl.float32)

    bc_mask = n < N
    B_ptr += i_b * B_stride_b + n * B_stride_n
    C_ptr += i_b * C_stride_b + n * C_stride_n
    if not ONE_GROUP:
        group = ((i_h * channels + d) // group_size)[None, :]
        B_ptr += group * B_stride_g
        C_ptr += group * C_stride_g
        bc_mask = nd_mask
    b = tl.load(B_ptr, mask=bc_mask & live, other=0.0)
    c = tl.load(C_ptr, mask=bc_mask & live, other=0.0)

    a_ptr = A_ptr + i_h * A_stride_h + d[None, :] * A_stride_d + n * A_stride_n
    a = tl.load(a_ptr, mask=nd_mask, other=0.0).to(tl.float32) * LOG2_E
    x = tl.load(x_ptr + i_b * x_stride_b + i_h * x_stride_h + d * x_stride_d, mask=d_mask & live, other=0.0)
    dt = tl.load(
        dt_ptr + i_b * dt_stride_b + i_h * dt_stride_h + d * dt_stride_d, mask=d_mask & live, other=0.0
    )
    skip = tl.full([BLOCK_D], 0.0, tl.float32)
    bias = skip
    z = x
    if HAS_D:
        skip = tl.load(D_ptr + i_h * D_stride_h + d * D_stride_d, mask=d_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias_ptr + i_h * bias_stride_h + d * bias_stride_d, mask=d_mask, other=0.0).to(
            tl.float32
        )
    if HAS_Z:
        z = tl.load(
            z_ptr + i_b * z_stride_b + i_h * z_stride_h + d * z_stride_d, mask=d_mask & live, other=0.0
        )

    h, y = ssm_token(h, a, skip, bias, x, dt, z, b, c, BLOCK_N, BLOCK_D, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS)
    out_ptr += i_b * out_stride_b + i_h * out_stride_h + d * out_stride_d
    tl.store(out_ptr, y.to(out_ptr.dtype.element_ty), mask=d_mask)
    tl.store(state_ptr, h.to(state_ptr.dtype.element_ty), mask=nd_mask & live)


@launcher(tensors=11)
def launch(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    z: torch.Tensor | None,
    out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    slots: torch.Tensor | None,
    dt_softplus: bool,
    pad_slot_id: int,
) -> Launch | None:
    """Launch the kernel for a call, whose arguments these are."""
    batch = x.shape[0]
    heads = x.shape[1] if x.dim() == 3 else 1
    channels, n = A.shape[-2:]
    groups = B.shape[1] if B.dim() == 3 else 1
    if batch == 0 or channels == 0 or heads == 0:
        return None
    plan = any_plan(batch, heads, channels, n)
    of_x, of_dt, of_z, of_out = (_strides(y, 1, 3) for y in (x, dt, z, out))
    strides = (
        *_strides(state, 1, 4), *of_x, *of_dt, *of_z, *of_out,
        *_strides(A, 0, 3), *_strides(B, 1, 3), *_strides(C, 1, 3), *_strides(D, 0, 2), *_strides(dt_bias, 0, 2),
    )  # fmt: skip
    constants = {
        "N": n, "BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d,
        "TOKEN_MAJOR": of_x[2] == of_dt[2] == of_z[2] == of_out[2] == 1, "ONE_GROUP": groups == 1,
        "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": dt_softplus,
        "HAS_SLOTS": slots is not None, "num_warps": plan.num_warps, "enable_fp_fusion": False,
    }  # fmt: skip
    values = (channels, heads * channels // groups, pad_slot_id, *strides)
    return Launch(_selective_state_update_kernel, plan.grid, values, constants)


def _strides(x: torch.Tensor | None, head_dim: int, dims: int) -> tuple[int, ...]:
    """Strides of ``x`` with a head dimension put in at ``head_dim`` if it is one short of ``dims``."""
    if x is None:
        return (0,) * (dims - 1) + (1,)
    strides = x.stride()
    return strides if len(strides) == dims else (*strides[:head_dim], 0, *strides[head_dim:])
