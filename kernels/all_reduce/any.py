"""Triton kernels of a plain all-reduce of any tensor without gaps: in one way over the link, or in two.

One way: every rank sends its term to all others, and each adds them up. Two ways: every rank is sent the terms of its
share of the elements, adds those up, and sends the sum to all others; of n ranks each sends 2 / n of what it would.

Bits: an element is the sum of the terms in rank order, from rank 0's on, in float32, rounded once; whichever way it
goes, and on every rank.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.all_reduce import mail
from tp_mamba.kernels.all_reduce.launch import plain_plan
from tp_mamba.kernels.all_reduce.layout import cells
from tp_mamba.kernels.all_reduce.mail import addresses, cells_of, fence, put_marks, send, sum_of_ranks, take
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.device import on_device_of


@triton.jit
def _send_block(
    x_ptr, first_e, E, peers, part,
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offset = tl.arange(0, BLOCK_E)
    mask = first_e + offset < E
    x = tl.load(x_ptr + first_e + offset, mask=mask, other=0.0)
    send(x, offset, mask, peers, part, RANK, RANK, SIZE, CELLS, False)


@triton.jit(do_not_specialize=["units"])
def _one_way_kernel(
    out_ptr,  # [E], any float, out; may be x
    x_ptr,  # [E], 16 or 32 bits, in
    rounds_ptr,  # [PROGRAMS] int32, in and out
    peers_ptr,  # [SIZE] int64, in
    units,
    UNIT: tl.constexpr,  # the elements are so many units; where they are many, accesses are of whole words
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    E = units.to(tl.int64) * UNIT
    i_p = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_E
    first_e = i_p * BLOCK_E
    offset = tl.arange(0, BLOCK_E)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    peers = addresses(peers_ptr, SIZE)
    wait_for_kernel_ahead(PDL)

    part = tl.load(rounds_ptr + i_p)
    _send_block(x_ptr, first_e, E, peers, part, RANK, SIZE, CELLS, BLOCK_E)
    if first_e + step < E:
        _send_block(x_ptr, first_e + step, E, peers, part + 1, RANK, SIZE, CELLS, BLOCK_E)
    while first_e < E:
        mask = first_e + offset < E
        own = tl.load(x_ptr + first_e + offset, mask=mask, other=0.0)
        cells = cells_of(peers[RANK], part, CELLS)
        total = sum_of_ranks(own, cells, offset, mask, DTYPE, RANK, SIZE)
        put_marks(cells, offset, mask, DTYPE, RANK, SIZE)
        if first_e + 2 * step < E:
            fence(part)
            _send_block(x_ptr, first_e + 2 * step, E, peers, part + 2, RANK, SIZE, CELLS, BLOCK_E)
        tl.store(out_ptr + first_e + offset, total.to(out_ptr.dtype.element_ty), mask=mask)
        part += 1
        first_e += step
    tl.store(rounds_ptr + i_p, part & (mail.WINDOW - 1))
    let_next_start(PDL)


@triton.jit
def _send_shares(
    x_ptr, first_e, E, peers, part,
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of SIZE adjacent blocks, send each to the rank that adds it up."""
    offset = tl.arange(0, BLOCK_E)
    for i_r in tl.static_range(SIZE):
        if i_r != RANK:
            e = first_e + i_r * BLOCK_E + offset
            x = tl.load(x_ptr + e, mask=e < E, other=0.0)
            send(x, offset, e < E, (peers[i_r],), part, RANK, -1, 1, CELLS, True)


@triton.jit(do_not_specialize=["units"])
def _two_ways_kernel(
    out_ptr,  # [E], any float, out; may be x
    x_ptr,  # [E], 16 or 32 bits, in
    rounds_ptr,  # [PROGRAMS] int32, in and out
    peers_ptr,  # [SIZE] int64, in
    units,
    UNIT: tl.constexpr,  # the elements are so many units; where they are many, accesses are of whole words
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    E = units.to(tl.int64) * UNIT
    i_p = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * (SIZE * BLOCK_E)
    first_e = i_p * (SIZE * BLOCK_E)
    offset = tl.arange(0, BLOCK_E)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SUM: tl.constexpr = out_ptr.dtype.element_ty
    peers = addresses(peers_ptr, SIZE)
    wait_for_kernel_ahead(PDL)

    part = tl.load(rounds_ptr + i_p)
    _send_shares(x_ptr, first_e, E, peers, part, RANK, SIZE, CELLS, BLOCK_E)
    if first_e + step < E:
        _send_shares(x_ptr, first_e + step, E, peers, part + 1, RANK, SIZE, CELLS, BLOCK_E)
    while first_e < E:
        cells = cells_of(peers[RANK], part, CELLS)
        sums = cells + SIZE * mail.CELL_BYTES
        e = first_e + RANK * BLOCK_E + offset
        own = tl.load(x_ptr + e, mask=e < E, other=0.0)
        total = sum_of_ranks(own, cells, offset, e < E, DTYPE, RANK, SIZE).to(SUM)
        put_marks(cells, offset, e < E, DTYPE, RANK, SIZE)
        send(total, offset, e < E, peers, part, SIZE + RANK, RANK, SIZE, CELLS, False)
        tl.store(out_ptr + e, total, mask=e < E)
        for i_r in tl.static_range(SIZE):
            if i_r != RANK:
                e = first_e + i_r * BLOCK_E + offset
                total = take(sums + i_r * mail.CELL_BYTES, offset, e < E, SUM)
                put_marks(sums + i_r * mail.CELL_BYTES, offset, e < E, SUM, -1, 1)
                tl.store(out_ptr + e, total, mask=e < E)
        if first_e + step < E:
            fence(part)
            if first_e + 2 * step < E:
                _send_shares(x_ptr, first_e + 2 * step, E, peers, part + 2, RANK, SIZE, CELLS, BLOCK_E)
        part += 1
        first_e += step
    tl.store(rounds_ptr + i_p, part & (mail.WINDOW - 1))
    let_next_start(PDL)


def launch(out: torch.Tensor, x: torch.Tensor, rounds: torch.Tensor, peers: torch.Tensor, rank: int) -> None:
    """Write the ranks' sum of ``x`` to ``out``, which may be ``x``: both without gaps, and as many elements."""
    E, size = x.numel(), len(peers)
    if E == 0:
        return
    plan = plain_plan(E, x.dtype, out.dtype, size, len(rounds))
    unit = 1 if E % 16 else 16
    kernel = _two_ways_kernel if plan.two_ways else _one_way_kernel
    with on_device_of(x):
        kernel[(plan.programs,)](
            out, x, rounds, peers, E // unit, UNIT=unit, RANK=rank, SIZE=size, CELLS=cells(size),
            BLOCK_E=plan.BLOCK_E, num_warps=plan.num_warps, maxnreg=plan.registers, **early_start(x.device),
        )  # fmt: skip
