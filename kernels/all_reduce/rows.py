"""Triton kernels of large sums by shares of rows: this rank's rows added up and normed; words of what has been sent.

Bits: terms are added in rank order, from rank 0's on, in float32; the sum is rounded once and goes on as in
``rms_norm.add_rms_norm``: a row lies on threads as it does there.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.all_reduce import mail
from tp_mamba.kernels.all_reduce.layout import cells
from tp_mamba.kernels.all_reduce.mail import addresses, cells_of, fence, put_marks, send, take
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.rms_norm.launch import launch_plan


@triton.jit
def _words_kernel(
    rounds_ptr,  # [1] int32, in and out
    peers_ptr,  # [SIZE] int64, in
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr,
    TAKE: tl.constexpr,
):  # fmt: skip
    """Tell every other rank that what the stream has written is there; or wait until they have told so."""
    offset = tl.arange(0, 4)
    peers = addresses(peers_ptr, SIZE)
    part = tl.load(rounds_ptr)
    if not TAKE:
        fence(part)
        send(tl.zeros([4], tl.int32), offset, offset < 4, peers, part, RANK, RANK, SIZE, CELLS, False)
    else:
        cells = cells_of(peers[RANK], part, CELLS)
        for i_r in tl.static_range(SIZE):
            if i_r != RANK:
                take(cells + i_r * mail.CELL_BYTES, offset, offset < 4, tl.int32)
        put_marks(cells, offset, offset < 4, tl.int32, RANK, SIZE)
        fence(part)
        tl.store(rounds_ptr, (part + 1) & (mail.WINDOW - 1))


@triton.jit(do_not_specialize=["count", "share"])
def _add_shares_kernel(
    out_ptr,  # [count, H] contiguous, as own, out
    new_residual_ptr,  # [share, H] contiguous, any float, out; or None, with NORM off
    own_ptr,  # [count, H] contiguous, 16 or 32 bits, in: this rank's term of its rows
    terms_ptr,  # [SIZE - 1, share, H] contiguous, as own, in: the other ranks'
    residual_ptr,  # [count, H], any float, in; or None
    weight_ptr,  # [H], any float, in; or None
    bias_ptr,  # [H], any float, in; or None
    count,
    share,
    H,
    eps,
    residual_stride_t: tl.int64, residual_stride_h,
    weight_stride_h,
    bias_stride_h,
    RANK: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
    mask = (t < count) & (h < H)
    DTYPE: tl.constexpr = own_ptr.dtype.element_ty
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + h * weight_stride_h, mask=h < H, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h * bias_stride_h, mask=h < H, other=0.0).to(tl.float32)
    wait_for_kernel_ahead(PDL)
    total = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for i_r in tl.static_range(SIZE):
        if i_r == RANK:
            term = tl.load(own_ptr + t * H + h, mask=mask, other=0.0)
        else:
            slot = (i_r if i_r < RANK else i_r - 1) * share.to(tl.int64)
            term = tl.load(terms_ptr + (slot + t) * H + h, mask=mask, other=0.0)
        total = term.to(tl.float32) if i_r == 0 else total + term.to(tl.float32)
    # The sum is rounded as that of a single rank is by its product, before and after the bias.
    x = total.to(DTYPE).to(tl.float32)
    if bias_ptr is not None:
        x = (x + bias).to(DTYPE).to(tl.float32)
    if NORM:
        if residual_ptr is not None:
            p_residual = residual_ptr + t * residual_stride_t + h * residual_stride_h
            x += tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
        # Rows that are nobody's are zeros.
        kept = tl.where(t < count, x, 0.0).to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + t * H + h, kept, mask=(t < share) & (h < H))
        out = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
        if weight_ptr is not None:
            out *= weight
    else:
        out = x
    tl.store(out_ptr + t * H + h, out.to(DTYPE), mask=mask)


@launcher(tensors=2)
def launch_words(rounds: torch.Tensor, peers: torch.Tensor, rank: int, take: bool) -> Launch | None:
    """Tell the other ranks of an exchange of one program, or wait until they have told (``take``)."""
    # Such a kernel is behind a copy, or behind two streams: there is no kernel ahead that it could start early of.
    size = len(peers)
    constants = {"RANK": rank, "SIZE": size, "CELLS": cells(size), "TAKE": take}
    return Launch(_words_kernel, (1,), (), constants | {"num_warps": 1})


@launcher(tensors=7)
def launch(
    out: torch.Tensor,
    new_residual: torch.Tensor | None,
    own: torch.Tensor,
    terms: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rank: int,
) -> Launch | None:
    """Write the sum of ``own [count, H]`` and ``terms [n - 1, share, H]``, or its norm if there is a ``new_residual``.

    ``out`` and ``new_residual``, which has ``share`` rows, are contiguous. ``new_residual``, ``residual``, ``weight``
    and ``bias`` may be None.
    """
    (count, H), (others, share, _) = own.shape, terms.shape
    plan = launch_plan(H)
    strides = (
        *((0, 0) if residual is None else residual.stride()),
        0 if weight is None else weight.stride(0),
        0 if bias is None else bias.stride(0),
    )
    constants = {
        "RANK": rank, "SIZE": others + 1, "NORM": new_residual is not None,
        "BLOCK_T": plan.BLOCK_T, "BLOCK_H": plan.BLOCK_H, "num_warps": plan.num_warps, **early_start(own.device),
    }  # fmt: skip
    return Launch(
        _add_shares_kernel, (cdiv(share, plan.BLOCK_T),), (count, share, H, eps, *strides), constants
    )
