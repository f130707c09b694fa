"""Sums over what the programs of a backward have written, each a row of its own: the second half of a reduction."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.dialect import add
from tp_mamba.kernels.common.integers import cdiv

_BLOCK_P, _BLOCK_C = 32, 64


@triton.jit(do_not_specialize=["P", "C", "out_stride_r", "out_stride_c", "stride_p", "stride_r"])
def _sum_kernel(
    out_ptr,  # [rows, C], any float, out
    partials_ptr,  # [P, rows, C] float32, in
    P,
    C,
    out_stride_r, out_stride_c, stride_p: tl.int64, stride_r: tl.int64,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    out_ptr += tl.program_id(1) * out_stride_r
    partials_ptr += tl.program_id(1) * stride_r
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[:, None]
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = partials_ptr + (first + p).to(tl.int64) * stride_p + c[None, :]
        total += tl.load(rows, mask=(first + p < P) & (c < C)[None, :], other=0.0)
    sums = tl.reduce(total, 0, add)
    tl.store(out_ptr + c * out_stride_c, sums.to(out_ptr.dtype.element_ty), mask=c < C)


def sum_partials(out: torch.Tensor, partials: torch.Tensor) -> None:
    """Write to ``out [..., C]``, any float dtype and strides, the sums over the first dimension of ``partials``.

    ``partials`` is ``[P, ..., C]`` float32, columns contiguous; ``...`` is one dimension or none. The order in which a
    column is summed depends on P alone.
    """
    P, C = partials.shape[0], partials.shape[-1]
    rows, out_stride_r, stride_r = (
        (1, 0, 0) if out.dim() == 1 else (len(out), out.stride(0), partials.stride(1))
    )
    if C:
        with on_device_of(out):
            _sum_kernel[(cdiv(C, _BLOCK_C), rows)](
                out, partials, P, C, out_stride_r, out.stride(-1), partials.stride(0), stride_r,
                BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C,
            )  # fmt: skip
