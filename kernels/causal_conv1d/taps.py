"""The arithmetic of a convolved token, which both kernels share: a token's bits do not depend on which of them ran."""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.causal_conv1d.launch import PER_THREAD
from tp_mamba.kernels.common.approximations import silu as approx_silu


@triton.jit
def load_taps(weight_ptr, first_d, d, m_d, stride_d, stride_k, K: tl.constexpr, PACKED: tl.constexpr):
    """The taps of channels ``first_d + d``: K float32 tensors like ``d``; PACKED: one word per channel."""
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


def is_packed(weight: torch.Tensor) -> bool:
    """Whether the taps of a channel in ``weight [D, K]`` can be read as one word of 4 or 8 bytes, several per load."""
    channels, width = weight.shape
    return (
        width * weight.element_size() in (4, 8)
        and channels % PER_THREAD == 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )
