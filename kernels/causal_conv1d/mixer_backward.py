"""Triton kernel of the convolution's backward for the layout that a mixer has: channels contiguous.

A program walks a run of tokens of a block of channels, once, in the order of time. It keeps the last K - 1 inputs, and
what the last K - 1 gradients of inputs have gathered so far: token t computes g_t from inputs that it has, adds it to
the gradients of inputs t - (K-1) .. t, and the oldest of these is finished and written. After its run come K - 1 more
tokens, whose g belongs to the gradients of the run's last inputs; the next program computes it too. So every element is
read once, but for K - 1 tokens per run, and no program waits for another.

Sums over tokens, for dweight and dbias, are taken in registers along a run, and written once per run: ``[runs, K + 1,
D]``, added up by a second kernel in a fixed order.
"""

# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)
# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.causal_conv1d.borders import border_in, since_of, until_of
from tp_mamba.kernels.causal_conv1d.launch import backward_plan
from tp_mamba.kernels.causal_conv1d.taps import convolve, is_packed, load_taps
from tp_mamba.kernels.common.approximations import silu_slope
from tp_mamba.kernels.common.device import device_properties, on_device_of
from tp_mamba.kernels.common.integers import cdiv


@triton.jit
def _load_rows(ptr, t, low, high, m_d, stride_t: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows from ptr on, of tokens from t on; zeros outside ``low .. high - 1``."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(ptr + i * stride_t, mask=m_d & (t + i >= low) & (t + i < high), other=0.0),)
    return rows


@triton.jit
def _load_borders(borders_ptr, t, length, PACKED: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr):
    """The borders of COUNT tokens from t on, each a scalar."""
    found = ()
    for i in tl.static_range(COUNT):
        if PACKED:  # noqa: SIM108 - a ternary would trace both
            border = tl.load(borders_ptr + t + i, mask=t + i < length, other=0)
        else:
            border = border_in(t + i, length, K)
        found = found + (border,)
    return found


@triton.jit
def _token(
    x, dout, border, window, gathered, sums, taps, bias, state_ptr, stride_k, m_d,
    K: tl.constexpr, SILU: tl.constexpr, HAS_STATES: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One token: ``(window, gathered, sums)`` after it, and the gradient of the input K - 1 tokens ago."""
    since = since_of(border)
    inputs = ()
    for k in tl.static_range(K - 1):
        past = 0.0
        if HAS_STATES:
            # Of a sequence's own first tokens, inputs before its first come from its state.
            p_state = state_ptr + (since + k) * stride_k
            past = tl.load(p_state, mask=m_d & (since < K - 1 - k), other=0.0).to(tl.float32)
        inputs = inputs + (tl.where(since >= K - 1 - k, window[k], past),)
    inputs = inputs + (x,)
    g = dout
    if SILU:
        g = dout * silu_slope(convolve(inputs, taps, bias, False))
    after = ()
    for k in tl.static_range(K - 1):
        after = after + (tl.where(since >= K - 1 - k, tl.fma(taps[k], g, gathered[k]), gathered[k]),)
    after = after + (taps[K - 1] * g,)
    shifted = ()
    left = ()
    for k in tl.static_range(K - 1):
        shifted = shifted + (window[k + 1] if k < K - 2 else x,)
        left = left + (after[k + 1],)
    if SUM:
        added = ()
        for k in tl.static_range(K):
            added = added + (tl.fma(g, inputs[k], sums[k]),)
        sums = added + (sums[K] + g,)
    return shifted, left, sums, after[0]


@triton.jit
def _emit(
    dx, ptr, t, first, length, m_d, borders_ptr, dfinal_ptr, owners_ptr, dfinal_stride_s, dfinal_stride_k,
    PACKED: tl.constexpr, HAS_FINAL: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the input of token t, if the run owns it."""
    owned = (t >= first) & (t < length)
    if HAS_FINAL:
        until = until_of(border_in(t, length, K))
        p_final = dfinal_ptr
        if PACKED:
            until = until_of(tl.load(borders_ptr + t, mask=owned, other=0))
            p_final += tl.load(owners_ptr + t, mask=owned, other=0).to(tl.int64) * dfinal_stride_s
        last = owned & (until >= 1) & (until <= K - 1)
        dx += tl.load(p_final + (K - 1 - until) * dfinal_stride_k, mask=m_d & last, other=0.0).to(tl.float32)
    tl.store(ptr, dx.to(ptr.dtype.element_ty), mask=m_d & owned)


@triton.jit(
    do_not_specialize=["length", "num_seqs", "runs", "run_tokens"],
    do_not_specialize_on_alignment=["starts_ptr", "borders_ptr", "owners_ptr"],
)
def _walk_backward_kernel(
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
    runs,
    run_tokens,  # a multiple of GROUP, which is K - 1 or more
    x_stride_b: tl.int64, dout_stride_b: tl.int64, dx_stride_b: tl.int64, weight_stride_d, weight_stride_k,
    states_stride_s: tl.int64, states_stride_d: tl.int64, states_stride_k: tl.int64,
    dfinal_stride_s: tl.int64, dfinal_stride_d: tl.int64, dfinal_stride_k: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into addresses and masks.
    D: tl.constexpr, x_stride_t: tl.constexpr, dout_stride_t: tl.constexpr, dx_stride_t: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, PACKED_TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = starts_ptr is not None
    HAS_STATES: tl.constexpr = states_ptr is not None
    HAS_FINAL: tl.constexpr = dfinal_ptr is not None
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.program_id(0) // blocks_d
    m_d = (d >= 0) if D % BLOCK_D == 0 else (d < D)
    run = i % runs
    seq = (i // runs).to(tl.int64)
    first = run * run_tokens
    low = 0
    high = length
    if PACKED:
        low = tl.load(starts_ptr).to(tl.int32)
        high = tl.load(starts_ptr + num_seqs).to(tl.int32)
    x_ptr += seq * x_stride_b + first.to(tl.int64) * x_stride_t + d
    dout_ptr += seq * dout_stride_b + first.to(tl.int64) * dout_stride_t + d
    dx_ptr += seq * dx_stride_b + (first.to(tl.int64) - (K - 1)) * dx_stride_t + d
    if HAS_STATES:
        states_ptr += d * states_stride_d + (0 if PACKED else seq * states_stride_s)
    if HAS_FINAL:
        dfinal_ptr += d * dfinal_stride_d + (0 if PACKED else seq * dfinal_stride_s)

    before = _load_rows(x_ptr - (K - 1) * x_stride_t, first - (K - 1), low, high, m_d, x_stride_t, K - 1)
    x_ahead = _load_rows(x_ptr, first, low, high, m_d, x_stride_t, GROUP)
    dout_ahead = _load_rows(dout_ptr, first, low, high, m_d, dout_stride_t, GROUP)
    borders_ahead = _load_borders(borders_ptr, first, length, PACKED, K, GROUP)
    taps = load_taps(weight_ptr, 0, d, m_d, weight_stride_d, weight_stride_k, K, PACKED_TAPS)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(tl.float32)
    window = ()
    gathered = ()
    sums = (tl.zeros((BLOCK_D,), tl.float32),)
    for k in tl.static_range(K - 1):
        window = window + (before[k].to(tl.float32),)
        gathered = gathered + (tl.zeros((BLOCK_D,), tl.float32),)
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((BLOCK_D,), tl.float32),)

    groups = tl.cdiv(tl.minimum(length - first, run_tokens), GROUP)
    for j in range(groups):
        t = first + j * GROUP
        x = x_ahead
        dout = dout_ahead
        found = borders_ahead
        x_ptr += GROUP * x_stride_t
        dout_ptr += GROUP * dout_stride_t
        x_ahead = _load_rows(x_ptr, t + GROUP, low, high, m_d, x_stride_t, GROUP)
        dout_ahead = _load_rows(dout_ptr, t + GROUP, low, high, m_d, dout_stride_t, GROUP)
        borders_ahead = _load_borders(borders_ptr, t + GROUP, length, PACKED, K, GROUP)
        for i_s in tl.static_range(GROUP):
            p_state = states_ptr
            if PACKED and HAS_STATES:
                owner = tl.load(owners_ptr + t + i_s, mask=t + i_s < length, other=0).to(tl.int64)
                p_state += owner * states_stride_s
            window, gathered, sums, dx = _token(
                x[i_s].to(tl.float32), dout[i_s].to(tl.float32), found[i_s], window, gathered, sums, taps, bias,
                p_state, states_stride_k, m_d, K, SILU, HAS_STATES, True,
            )  # fmt: skip
            _emit(
                dx, dx_ptr + i_s * dx_stride_t, t + i_s - (K - 1), first, length, m_d, borders_ptr, dfinal_ptr,
                owners_ptr, dfinal_stride_s, dfinal_stride_k, PACKED, HAS_FINAL, K,
            )  # fmt: skip
        dx_ptr += GROUP * dx_stride_t

    # What tokens after the run add to the gradients of its last inputs.
    after_run = first + groups * GROUP
    for i_s in tl.static_range(K - 1):
        p_state = states_ptr
        if PACKED and HAS_STATES:
            owner = tl.load(owners_ptr + after_run + i_s, mask=after_run + i_s < length, other=0).to(tl.int64)
            p_state += owner * states_stride_s
        window, gathered, sums, dx = _token(
            x_ahead[i_s].to(tl.float32), dout_ahead[i_s].to(tl.float32), borders_ahead[i_s], window, gathered, sums,
            taps, bias, p_state, states_stride_k, m_d, K, SILU, HAS_STATES, False,
        )  # fmt: skip
        _emit(
            dx, dx_ptr + i_s * dx_stride_t, after_run + i_s - (K - 1), first, length, m_d, borders_ptr, dfinal_ptr,
            owners_ptr, dfinal_stride_s, dfinal_stride_k, PACKED, HAS_FINAL, K,
        )  # fmt: skip

    p_partials = partials_ptr + i.to(tl.int64) * ((K + 1) * D) + d
    for k in tl.static_range(K + 1):
        tl.store(p_partials + k * D, sums[k], mask=m_d)


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
    """Write ``dx``; returns the partial sums ``[P, K + 1, D]`` float32. All of ``[B, D, L]`` with channels contiguous.

    A packed batch is one of ``[1, D, T]``, with ``borders`` and ``owners`` of its tokens.
    """
    (batch, channels, length), K = x.shape, weight.shape[1]
    stateful = states is not None or dfinal is not None
    plan = backward_plan(batch, channels, length, stateful, device_properties(x.device))
    runs = cdiv(length, plan.run_tokens)
    partials = x.new_empty(batch * runs, K + 1, channels, dtype=torch.float32)
    # The batch stride of a packed batch must not vary with T.
    strides_b = [0 if query_start_loc is not None else y.stride(0) for y in (x, dout, dx)]
    with on_device_of(x):
        _walk_backward_kernel[(batch * runs * cdiv(channels, plan.BLOCK_D),)](
            dx, partials, dout, dfinal, x, weight, bias, states, query_start_loc, borders, owners,
            length, 0 if query_start_loc is None else query_start_loc.shape[0] - 1, runs, plan.run_tokens,
            *strides_b, *weight.stride(), *((0, 0, 0) if states is None else states.stride()),
            *((0, 0, 0) if dfinal is None else dfinal.stride()),
            D=channels, x_stride_t=x.stride(2), dout_stride_t=dout.stride(2), dx_stride_t=dx.stride(2),
            K=K, SILU=silu, PACKED_TAPS=is_packed(weight), GROUP=plan.BLOCK_T, BLOCK_D=plan.BLOCK_D,
            num_warps=plan.num_warps,
        )  # fmt: skip
    return partials
