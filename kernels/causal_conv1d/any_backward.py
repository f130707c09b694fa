"""Triton kernels of the convolution's backward for every layout, and of the gradient of initial states.

A program takes tiles of tokens by channels, one after another. For the gradient of a token's input it computes g of the
token and of the K - 1 after it, each from K inputs: 2 K - 1 tiles of x and K of dout are read, shifted, mostly from the
cache. What is computed, and in which order, is that of ``mixer_backward.py``; sums over tokens are taken by tiles.
"""

# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.causal_conv1d.borders import border_in, since_of, until_of
from tp_mamba.kernels.causal_conv1d.launch import backward_tiles
from tp_mamba.kernels.causal_conv1d.taps import convolve
from tp_mamba.kernels.common.approximations import silu_slope
from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.integers import cdiv


@triton.jit(
    do_not_specialize=["length", "num_seqs", "runs", "run_tokens"],
    do_not_specialize_on_alignment=["starts_ptr", "borders_ptr", "owners_ptr"],
)
def _tiles_backward_kernel(
    dx_ptr,  # [B, D, L] or [1, D, T], out
    partials_ptr,  # [B * runs, K + 1, D] float32, out: sums of g x for each tap, and of g
    dout_ptr,  # like dx, in
    dfinal_ptr,  # [S, D, K - 1], in; or None
    x_ptr,  # like dx, in
    weight_ptr,  # [D, K], in
    bias_ptr,  # [D], in; or None
    states_ptr,  # [S, D, K - 1], initial, in; or None
    starts_ptr,  # [S + 1] integers: packed batch; None: dense batch
    borders_ptr,  # [T] int32, in; or None
    owners_ptr,  # [T] int32, in; or None
    length,  # L, or T of a packed batch
    num_seqs,
    D,
    runs,
    run_tokens,  # a multiple of BLOCK_T
    x_stride_b: tl.int64, x_stride_d: tl.int64, x_stride_t, dout_stride_b: tl.int64, dout_stride_d: tl.int64,
    dout_stride_t, dx_stride_b: tl.int64, dx_stride_d: tl.int64, dx_stride_t, weight_stride_d, weight_stride_k,
    states_stride_s: tl.int64, states_stride_d: tl.int64, states_stride_k: tl.int64,
    dfinal_stride_s: tl.int64, dfinal_stride_d: tl.int64, dfinal_stride_k: tl.int64,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_d = tl.cdiv(D, BLOCK_D)
    d = (tl.program_id(0) % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    i = tl.program_id(0) // blocks_d
    m_d = d < D
    run = i % runs
    seq = (i // runs).to(tl.int64)
    low = 0
    high = length
    if starts_ptr is not None:
        low = tl.load(starts_ptr).to(tl.int32)
        high = tl.load(starts_ptr + num_seqs).to(tl.int32)
    x_ptr += seq * x_stride_b + d * x_stride_d
    dout_ptr += seq * dout_stride_b + d * dout_stride_d
    dx_ptr += seq * dx_stride_b + d * dx_stride_d

    taps = ()
    sums = ()
    for k in tl.static_range(K):
        p_tap = weight_ptr + d * weight_stride_d + k * weight_stride_k
        taps = taps + (tl.load(p_tap, mask=m_d, other=0.0).to(tl.float32),)
        sums = sums + (tl.zeros((BLOCK_D,), tl.float32),)
    sums = sums + (tl.zeros((BLOCK_D,), tl.float32),)
    bias = tl.zeros((1, BLOCK_D), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(tl.float32)

    first = run * run_tokens
    count = tl.minimum(length - first, run_tokens)
    for tile in range(tl.cdiv(count, BLOCK_T)):
        t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        owner = seq
        if starts_ptr is None:
            border = border_in(t, length, K)
        else:
            border = tl.load(borders_ptr + t, mask=t < length, other=0)
            if states_ptr is not None or dfinal_ptr is not None:
                owner = tl.load(owners_ptr + t, mask=t < length, other=0).to(tl.int64)
        since = since_of(border)
        until = until_of(border)

        inputs = ()
        for k in tl.static_range(2 * K - 1):
            u = t + (k - (K - 1))
            within = (u >= low) & (u < high)
            if k < K - 1:
                within = within & (since >= K - 1 - k)
            x = tl.load(x_ptr + u.to(tl.int64) * x_stride_t, mask=m_d & within, other=0.0).to(tl.float32)
            if k < K - 1 and states_ptr is not None:
                p_state = states_ptr + owner * states_stride_s + d * states_stride_d
                p_state += (since + k) * states_stride_k
                before = m_d & (since < K - 1 - k) & (until > 0)
                x += tl.load(p_state, mask=before, other=0.0).to(tl.float32)
            inputs = inputs + (x,)
        dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for j in tl.static_range(K):
            u = t + j
            within = (u >= low) & (u < high)
            g = tl.load(dout_ptr + u.to(tl.int64) * dout_stride_t, mask=m_d & within, other=0.0).to(
                tl.float32
            )
            if SILU:
                window = ()
                for k in tl.static_range(K):
                    window = window + (inputs[j + k],)
                g = g * silu_slope(convolve(window, taps, bias, False))
            if j == 0:
                dx = taps[K - 1] * g
                added = ()
                for k in tl.static_range(K):
                    added = added + (sums[k] + tl.sum(g * inputs[k], axis=0),)
                sums = added + (sums[K] + tl.sum(g, axis=0),)
            else:
                dx = tl.where(j < until, tl.fma(taps[K - 1 - j], g, dx), dx)
        if dfinal_ptr is not None:
            p_final = dfinal_ptr + owner * dfinal_stride_s + d * dfinal_stride_d
            last = (until >= 1) & (until <= K - 1)
            p_final += (K - 1 - until) * dfinal_stride_k
            dx += tl.load(p_final, mask=m_d & last, other=0.0).to(tl.float32)
        p_dx = dx_ptr + t.to(tl.int64) * dx_stride_t
        tl.store(p_dx, dx.to(dx_ptr.dtype.element_ty), mask=m_d & (t < length))

    column = (tl.program_id(0) % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    p_partials = partials_ptr + i.to(tl.int64) * ((K + 1) * D) + column
    for k in tl.static_range(K + 1):
        tl.store(p_partials + k * D, sums[k], mask=column < D)


@triton.jit(do_not_specialize=["length", "D"], do_not_specialize_on_alignment=["starts_ptr"])
def _states_backward_kernel(
    dinitial_ptr,  # [S, D, K - 1], out
    dout_ptr,  # [B, D, L] or [1, D, T], in
    dfinal_ptr,  # [S, D, K - 1], in; or None
    x_ptr,  # like dout, in
    weight_ptr,  # [D, K], in
    bias_ptr,  # [D], in; or None
    states_ptr,  # [S, D, K - 1], initial, in
    starts_ptr,  # [S + 1] integers: packed batch; None: dense batch
    length,  # L
    D,
    x_stride_b: tl.int64, x_stride_d: tl.int64, x_stride_t, dout_stride_b: tl.int64, dout_stride_d: tl.int64,
    dout_stride_t, weight_stride_d, weight_stride_k,
    states_stride_s: tl.int64, states_stride_d: tl.int64, states_stride_k: tl.int64,
    dinitial_stride_s: tl.int64, dinitial_stride_d: tl.int64, dinitial_stride_k: tl.int64,
    dfinal_stride_s: tl.int64, dfinal_stride_d: tl.int64, dfinal_stride_k: tl.int64,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = d < D
    x_ptr += d * x_stride_d
    dout_ptr += d * dout_stride_d
    if starts_ptr is None:
        x_ptr += seq * x_stride_b
        dout_ptr += seq * dout_stride_b
    else:
        start = tl.load(starts_ptr + seq).to(tl.int64)
        length = (tl.load(starts_ptr + seq + 1).to(tl.int64) - start).to(tl.int32)
        x_ptr += start * x_stride_t
        dout_ptr += start * dout_stride_t

    taps = ()
    inputs = ()
    for k in tl.static_range(K):
        p_tap = weight_ptr + d * weight_stride_d + k * weight_stride_k
        taps = taps + (tl.load(p_tap, mask=m_d, other=0.0).to(tl.float32),)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(tl.float32)
    p_state = states_ptr + seq * states_stride_s + d * states_stride_d
    for k in tl.static_range(K - 1):
        inputs = inputs + (tl.load(p_state + k * states_stride_k, mask=m_d, other=0.0).to(tl.float32),)
    for t in tl.static_range(K - 1):
        x = tl.load(x_ptr + t * x_stride_t, mask=m_d & (t < length), other=0.0)
        inputs = inputs + (x.to(tl.float32),)
    gradients = ()
    for t in tl.static_range(K - 1):
        g = tl.load(dout_ptr + t * dout_stride_t, mask=m_d & (t < length), other=0.0).to(tl.float32)
        if SILU:
            window = ()
            for k in tl.static_range(K):
                window = window + (inputs[t + k],)
            g = g * silu_slope(convolve(window, taps, bias, False))
        gradients = gradients + (g,)
    p_dinitial = dinitial_ptr + seq * dinitial_stride_s + d * dinitial_stride_d
    for c in tl.static_range(K - 1):
        total = tl.zeros((BLOCK_D,), tl.float32)
        for k in tl.static_range(c + 1):
            total = tl.fma(taps[k], gradients[c - k], total)
        if dfinal_ptr is not None:  # of fewer than K - 1 tokens, the final state is in part the initial one
            p_final = dfinal_ptr + seq * dfinal_stride_s + d * dfinal_stride_d
            p_final += (c - length) * dfinal_stride_k
            total += tl.load(p_final, mask=m_d & (c >= length), other=0.0).to(tl.float32)
        p_column = p_dinitial + c * dinitial_stride_k
        tl.store(p_column, total.to(dinitial_ptr.dtype.element_ty), mask=m_d)


def launch(
    dx: torch.Tensor,
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    borders: torch.Tensor | None,
    owners: torch.Tensor | None,
) -> torch.Tensor:
    """Same contract as ``mixer_backward.launch``, for any strides."""
    (batch, channels, length), K = x.shape, weight.shape[1]
    plan = backward_tiles(length)
    runs = cdiv(length, plan.run_tokens)
    partials = x.new_empty(batch * runs, K + 1, channels, dtype=torch.float32)
    with on_device_of(x):
        _tiles_backward_kernel[(batch * runs * cdiv(channels, plan.BLOCK_D),)](
            dx, partials, dout, dfinal, x, weight, bias, states, query_start_loc, borders, owners,
            length, 0 if query_start_loc is None else query_start_loc.shape[0] - 1, channels, runs, plan.run_tokens,
            *x.stride(), *dout.stride(), *dx.stride(), *weight.stride(),
            *((0, 0, 0) if states is None else states.stride()),
            *((0, 0, 0) if dfinal is None else dfinal.stride()),
            K=K, SILU=silu, BLOCK_T=plan.BLOCK_T, BLOCK_D=plan.BLOCK_D, num_warps=plan.num_warps,
        )  # fmt: skip
    return partials


def launch_states(
    dinitial: torch.Tensor,
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    states: torch.Tensor,
    query_start_loc: torch.Tensor | None,
) -> None:
    """Write ``dinitial [S, D, K - 1]``: what the first K - 1 tokens of each sequence, and its final state, give it."""
    (S, channels, past), length, block_d = states.shape, x.shape[2], 256
    if S == 0 or channels == 0:
        return
    with on_device_of(x):
        _states_backward_kernel[(S, cdiv(channels, block_d))](
            dinitial, dout, dfinal, x, weight, bias, states, query_start_loc, length, channels,
            *x.stride(), *dout.stride(), *weight.stride(), *states.stride(), *dinitial.stride(),
            *((0, 0, 0) if dfinal is None else dfinal.stride()),
            K=past + 1, SILU=silu, BLOCK_D=block_d,
        )  # fmt: skip
