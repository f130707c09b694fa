"""The convolution's one-step update for the layout that a mixer has: one token a row, channels contiguous everywhere.

A thread owns ``PER_THREAD`` adjacent channels of ``ROWS`` batch rows: it reads their K - 1 past inputs and the new one
in whole words and writes back what it read itself, so that no thread waits for another. All it reads is on its way
before the first row is computed; only the past inputs wait for the row's slot.

:func:`load_taps` and :func:`convolve` are also those of the general kernel: a token's bits do not depend on which of
the two ran.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import silu as approx_silu
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.dialect import jit_by_type
from tp_mamba.kernels.common.integers import cdiv

NUM_WARPS = 4

PER_THREAD = 4
"""Channels: 8 bytes of a 16-bit dtype a load. A single row of 8192 channels is then 16 programs; twice as many channels
would leave half of those multiprocessors idle and save nothing, since memory is what is waited for."""

ROWS = 1
"""Batch rows a program. Weights and bias come from the L2 for every program, 10 bytes a channel where a row's inputs
are 8; even so an H200 takes 2 to 5 % longer with two rows a program, and more with four."""


@triton.jit
def load_taps(weight_ptr, first_d, d, m_d, stride_d, stride_k, K: tl.constexpr, PACKED: tl.constexpr):
    """K tensors float32 like ``d``, the taps of channels ``first_d + d``; a channel's in one word where PACKED."""
    taps = ()
    if PACKED:
        BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
        word_type: tl.constexpr = tl.int64 if K * BITS == 64 else tl.int32
        tap_type: tl.constexpr = tl.int32 if BITS == 32 else tl.int16
        words = tl.multiple_of(weight_ptr.to(tl.pointer_type(word_type)) + first_d, 16)
        word = tl.load(words + d, mask=m_d, other=0)
        for k in tl.static_range(K):
            tap = (word >> (k * BITS)).to(tap_type)
            taps = taps + (tap.to(weight_ptr.dtype.element_ty, bitcast=True).to(tl.float32),)
    else:
        for k in tl.static_range(K):
            p_tap = weight_ptr + (first_d + d) * stride_d + k * stride_k
            taps = taps + (tl.load(p_tap, mask=m_d, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def convolve(window, taps, acc, SILU: tl.constexpr):
    """``silu(acc + sum_k window[k] * taps[k])``, oldest first; window and taps are K-tuples of float32."""
    for k in tl.static_range(len(taps)):
        acc = tl.fma(window[k], taps[k], acc)
    if SILU:
        acc = approx_silu(acc)
    return acc


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def _step_kernel(
    out_ptr,  # [B, D], written
    x_ptr,  # [B, D], read
    weight_ptr,  # [D, K], read
    bias_ptr,  # [D] or None, read
    state_ptr,  # [slots, D, K - 1], read and written
    slot_ptr,  # [B] integers or None: slot b is row b
    batch: tl.int32,
    channel_words: tl.int32,  # D / PER_THREAD
    pad_slot_id: tl.int64,
    out_stride_b: tl.int64, x_stride_b: tl.int64, state_stride_s: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into the loads and stores.
    weight_stride_d: tl.constexpr, weight_stride_k: tl.constexpr, state_stride_k: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, PACKED: tl.constexpr,
    PER_THREAD: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    # That words are whole is for the launcher to see to, and for the compiler to be told of every address.
    X_WORD: tl.constexpr = PER_THREAD * (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    STATE_WORD: tl.constexpr = PER_THREAD * (state_ptr.dtype.element_ty.primitive_bitwidth // 8)
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D)
    inside = first_d + d < channel_words.to(tl.int64) * PER_THREAD
    first = tl.program_id(0) * ROWS

    slots = ()
    for i in tl.static_range(ROWS):
        slot = (first + i).to(tl.int64)
        if HAS_SLOTS:
            slot = tl.load(slot_ptr + slot, mask=slot < batch, other=0).to(tl.int64)
        slots = slots + (slot,)
    taps = load_taps(weight_ptr, first_d, d, inside, weight_stride_d, weight_stride_k, K, PACKED)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        BIAS_WORD: tl.constexpr = PER_THREAD * (bias_ptr.dtype.element_ty.primitive_bitwidth // 8)
        bias = tl.load(tl.multiple_of(bias_ptr + first_d, BIAS_WORD) + d, mask=inside, other=0.0).to(
            tl.float32
        )
    wait_for_kernel_ahead(PDL)

    # Every row's inputs are on their way before the first is used. No slot is two rows'.
    rows = ()
    for i in tl.static_range(ROWS):
        row = (first + i).to(tl.int64)
        real = row < batch
        slot = slots[i]
        live = real & (slot != pad_slot_id) if HAS_SLOTS else real
        p_state = tl.multiple_of(state_ptr + slot * state_stride_s + first_d, STATE_WORD) + d
        p_x = tl.multiple_of(x_ptr + row * x_stride_b + first_d, X_WORD) + d
        inputs = ()
        for k in tl.static_range(K - 1):
            inputs = inputs + (tl.load(p_state + k * state_stride_k, mask=inside & live, other=0.0),)
        inputs = inputs + (tl.load(p_x, mask=inside & live, other=0.0),)
        rows = rows + ((row, real, live, p_state, inputs),)

    for i in tl.static_range(ROWS):
        row, real, live, p_state, inputs = rows[i]
        if real:
            window = ()
            for k in tl.static_range(K):
                window = window + (inputs[k].to(tl.float32),)
            out = tl.where(live, convolve(window, taps, bias, SILU), 0.0)
            p_out = tl.multiple_of(out_ptr + row * out_stride_b + first_d, X_WORD) + d
            tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=inside)
            for k in tl.static_range(K - 1):
                column = inputs[k + 1].to(state_ptr.dtype.element_ty)
                tl.store(p_state + k * state_stride_k, column, mask=inside & live)


def is_packed(weight: torch.Tensor) -> bool:
    """Whether the taps ``[D, K]`` of a channel can be loaded as one word of 4 or 8 bytes, a few channels a load."""
    channels, width = weight.shape
    return (
        width * weight.element_size() in (4, 8)
        and channels % PER_THREAD == 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def takes_step(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether :func:`launch_step` takes ``x [B, D, 1]`` and the rest: channels contiguous, K - 1 inputs a state."""
    return (
        x.shape[2] == 1
        and states.shape[2] == weight.shape[1] - 1
        and x.stride(1) == out.stride(1) == states.stride(1) == 1
    )


def launch_step(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    states: torch.Tensor,
    slots: torch.Tensor | None,
    pad_slot_id: int,
) -> None:
    """One token a row, from and into its slot; a row at ``pad_slot_id`` gives zeros. For what :func:`takes_step`."""
    batch, channels, _ = x.shape
    if batch == 0 or channels == 0:
        return
    tensors = [x, out, states] if bias is None else [x, out, states, bias]
    stride_k = states.stride(2) if states.shape[2] > 1 else 0  # of a single column it says nothing
    strides = [channels, x.stride(0), out.stride(0), states.stride(0), stride_k]
    whole_words = all(t.data_ptr() % (PER_THREAD * t.element_size()) == 0 for t in tensors) and all(
        stride % PER_THREAD == 0 for stride in strides
    )
    per_thread, packed = (PER_THREAD, is_packed(weight)) if whole_words else (1, False)
    block_d = 32 * NUM_WARPS * PER_THREAD
    with torch.cuda.device_of(x):
        _step_kernel[(cdiv(batch, ROWS), cdiv(channels, block_d))](
            out, x, weight, bias, states, slots,
            batch, channels // per_thread, pad_slot_id, out.stride(0), x.stride(0), states.stride(0),
            *weight.stride(), stride_k,
            K=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None,
            PACKED=packed, PER_THREAD=per_thread, BLOCK_D=block_d, ROWS=ROWS, num_warps=NUM_WARPS,
            **early_start(x.device),
        )  # fmt: skip
