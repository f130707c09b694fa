"""The convolution's one-step update for the layout that a mixer has: one token per row, channels contiguous everywhere.

A thread owns ``PER_THREAD`` adjacent channels of ``BLOCK_B`` batch rows: it reads their K - 1 past inputs and the new
one in whole words and writes back what it read itself, so that no thread waits for another. All its loads are in flight
before the first row is computed; only those of past inputs wait for the row's slot.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import torch
import triton.language as tl

from tp_mamba.kernels.causal_conv1d.launch import PER_THREAD, STEP
from tp_mamba.kernels.causal_conv1d.taps import convolve, is_packed, load_taps
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.dialect import jit_by_type
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.launches import Launch, launcher


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def _step_kernel(
    out_ptr,  # [B, D], out
    x_ptr,  # [B, D], in
    weight_ptr,  # [D, K], in
    bias_ptr,  # [D], in; or None
    state_ptr,  # [slots, D, K - 1], in and out
    slot_ptr,  # [B] integers or None: slot b is row b
    batch: tl.int32,
    channel_words: tl.int32,  # D / PER_THREAD
    pad_slot_id: tl.int64,
    out_stride_b: tl.int64, x_stride_b: tl.int64, state_stride_s: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into the loads and stores.
    weight_stride_d: tl.constexpr, weight_stride_k: tl.constexpr, state_stride_k: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, PACKED: tl.constexpr,
    PER_THREAD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    # That words are whole is for the launcher to see to, and for the compiler to be told of every address.
    X_WORD: tl.constexpr = PER_THREAD * (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    STATE_WORD: tl.constexpr = PER_THREAD * (state_ptr.dtype.element_ty.primitive_bitwidth // 8)
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D)
    inside = first_d + d < channel_words.to(tl.int64) * PER_THREAD
    first = tl.program_id(0) * BLOCK_B

    slots = ()
    for i in tl.static_range(BLOCK_B):
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

    # Every row's inputs are in flight before the first is used. No two rows have the same slot.
    rows = ()
    for i in tl.static_range(BLOCK_B):
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

    for i in tl.static_range(BLOCK_B):
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


@launcher(tensors=6)
def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor | None,
    silu: bool,
    pad_slot_id: int,
) -> Launch | None:
    """One token per row, from and into its slot; a row at ``pad_slot_id`` gives zeros.

    For ``x [B, D]`` or ``[B, D, 1]``, channels contiguous everywhere, and states of K - 1 inputs.
    """
    batch, channels, K = x.shape[0], x.shape[1], weight.shape[1]
    one_token = x.dim() == 2 or x.shape[2] == 1
    if not (one_token and states.shape[2] == K - 1 and x.stride(1) == out.stride(1) == states.stride(1) == 1):
        return None
    if batch == 0 or channels == 0:
        return None
    x_stride_b, out_stride_b = x.stride(0), out.stride(0)
    state_stride_s, _, state_stride_k = states.stride()
    if K == 2:
        state_stride_k = 0  # the stride of a single column says nothing
    whole_words = not (channels | x_stride_b | out_stride_b | state_stride_s | state_stride_k) % PER_THREAD
    for tensor in (x, out, states, bias):
        if tensor is not None and tensor.data_ptr() % (PER_THREAD * tensor.element_size()):
            whole_words = False
    per_thread, packed = (PER_THREAD, is_packed(weight)) if whole_words else (1, False)
    values = (
        batch, channels // per_thread, pad_slot_id, out_stride_b, x_stride_b, state_stride_s,
        *weight.stride(), state_stride_k,
    )  # fmt: skip
    constants = {
        "K": K, "SILU": silu, "HAS_BIAS": bias is not None, "HAS_SLOTS": slots is not None, "PACKED": packed,
        "PER_THREAD": per_thread, "BLOCK_B": STEP.BLOCK_B, "BLOCK_D": STEP.BLOCK_D, "num_warps": STEP.num_warps,
        **early_start(x.device),
    }  # fmt: skip
    return Launch(_step_kernel, (cdiv(batch, STEP.BLOCK_B), cdiv(channels, STEP.BLOCK_D)), values, constants)
