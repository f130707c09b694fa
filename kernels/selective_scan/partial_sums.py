"""The second half of the sums of the scan's backward: over blocks of channels, and over sequences, in a fixed order."""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.dialect import jit_by_type, tree_of
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.selective_scan.arguments import ScanBackward, ScanGradients

_BLOCK, _WAYS = 512, 8


@triton.jit
def _sum_of_rows(ptr, stride, rows, mask, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """The sum of ``rows`` blocks, ``stride`` apart: WAYS running sums of every WAYS-th row, then those as a tree."""
    sums = ()
    for _way in tl.static_range(WAYS):
        sums = sums + (tl.full([BLOCK], 0.0, tl.float32),)
    for row in range(0, rows, WAYS):
        after = ()
        for way in tl.static_range(WAYS):
            x = tl.load(ptr + (row + way) * stride, mask=mask & (row + way < rows), other=0.0)
            after = after + (sums[way] + x,)
        sums = after
    return tree_of(sums, 0, WAYS)


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def _sum_over_blocks_kernel(
    dbc_ptr,  # [blocks, tokens, G, 2, N] float32 contiguous, in
    start_ptr,  # [S + 1] int, or None: dense
    dB_ptr,  # [B, G, N, L] or [G, N, T], any float, out
    dC_ptr,  # as dB, out
    blocks: tl.int32,
    tokens: tl.int64,
    length: tl.int64,  # of a row of dB: L or T
    sequences: tl.int64,
    groups: tl.int64,
    dB_stride_s: tl.int64, dB_stride_g: tl.int64, dB_stride_n: tl.int64, dB_stride_t: tl.int64,
    dC_stride_s: tl.int64, dC_stride_g: tl.int64, dC_stride_n: tl.int64, dC_stride_t: tl.int64,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tokens * groups * (2 * N)
    mask = at < size
    total = _sum_of_rows(dbc_ptr + at, size, blocks, mask, BLOCK, WAYS)
    n = at % N
    is_c = at // N % 2 == 1
    g = at // (2 * N) % groups
    token = at // (2 * N) // groups
    if VARLEN:  # what no sequence has, nothing has written
        first = tl.load(start_ptr).to(tl.int64)
        stop = tl.load(start_ptr + sequences).to(tl.int64)
        total = tl.where((token >= first) & (token < stop), total, 0.0)
    s = token // length
    t = token % length
    p_dB = dB_ptr + s * dB_stride_s + g * dB_stride_g + n * dB_stride_n + t * dB_stride_t
    p_dC = dC_ptr + s * dC_stride_s + g * dC_stride_g + n * dC_stride_n + t * dC_stride_t
    tl.store(p_dB, total.to(dB_ptr.dtype.element_ty), mask=mask & (at // N % 2 == 0))
    tl.store(p_dC, total.to(dC_ptr.dtype.element_ty), mask=mask & is_c)


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def _sum_over_sequences_kernel(
    sums_ptr,  # [parts, N + 2, D] float32 contiguous, in: of sequences, or segments of them
    dA_ptr,  # [D, N], any float, out
    dD_ptr,  # [D] or None, out
    dbias_ptr,  # [D] or None, out
    parts: tl.int32,
    channels: tl.int64,
    dA_stride_d: tl.int64, dA_stride_n: tl.int64,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = d < channels
    total = _sum_of_rows(sums_ptr + row * channels + d, (N + 2) * channels, parts, mask, BLOCK, WAYS)
    if row < N:
        tl.store(dA_ptr + d * dA_stride_d + row * dA_stride_n, total.to(dA_ptr.dtype.element_ty), mask=mask)
    if HAS_D:  # noqa: SIM102 - the pointer exists only then
        if row == N:
            tl.store(dD_ptr + d, total.to(dD_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:  # noqa: SIM102
        if row == N + 1:
            tl.store(dbias_ptr + d, total.to(dbias_ptr.dtype.element_ty), mask=mask)


def sum_partial(call: ScanBackward, grads: ScanGradients, dbc: torch.Tensor, sums: torch.Tensor) -> None:
    """Write dB, dC from ``dbc [blocks, tokens, G, 2, N]``, and dA, dD, d(bias) from ``sums [parts, N + 2, D]``."""
    blocks, tokens, groups, _, n = dbc.shape
    (channels, _), packed = call.A.shape, call.query_start_loc is not None
    by_group = [(0, *x.stride()) if packed else x.stride() for x in (grads.B, grads.C)]
    _sum_over_blocks_kernel[(cdiv(tokens * groups * 2 * n, _BLOCK),)](
        dbc, call.query_start_loc, grads.B, grads.C, blocks, tokens, call.u.shape[-1], call.sequences, groups,
        *by_group[0], *by_group[1], N=n, BLOCK=_BLOCK, WAYS=_WAYS, VARLEN=packed,
    )  # fmt: skip
    _sum_over_sequences_kernel[(n + 2, cdiv(channels, 128))](
        sums, grads.A, grads.D, grads.delta_bias, len(sums), channels, *grads.A.stride(), N=n, BLOCK=128,
        WAYS=_WAYS, HAS_D=grads.D is not None, HAS_BIAS=grads.delta_bias is not None,
    )  # fmt: skip
