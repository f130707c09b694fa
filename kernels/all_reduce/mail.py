"""Sending a block to the other ranks, waiting for theirs, and adding them up: what all kernels here are made of.

An inbox is full of the *mark*, a value with all bits set, wherever nothing is in transit. A sender stores its block
straight into the inboxes of the others. A receiver reads its own inbox until no element is a mark any more, and puts
the marks back. No flag travels behind the data, nothing is asked for, and no barrier is passed: a block takes one way
over the link. The mark is a NaN, in 16 bits as in 32; a sender turns that one NaN into another, and all else travels
as it is. An element is stored and loaded as a whole, so that it is either a mark or complete, in whichever order the
elements of a block arrive.

Why the WINDOW is four. A program sends round m once it has taken all that round m - 2 was to bring. So it has seen,
of every other rank, something that it sent in round m - 2, which that rank did once it had taken, and put the marks
back into, its round m - 4. Round m goes into the same part of the inbox as m - 4 did, and finds marks. Two ranks or
eight, the argument is one about pairs; a rank may be late by any time; what the ranks have sent is counted over all
kernels of a group, so a kernel needs no barrier at its end, and a graph's replay nothing at its beginning.

Orders of memory. Marks put back must be in memory before what the same rank sends afterwards can be answered. Between
two kernels the end of the first sees to that. Inside one, :func:`fence` does: every thread waits until its stores are
performed for the whole system, then for the other threads. Reads are volatile: none is served by L1 or left out.

A block waits as one: the loop ends by a value reduced over all threads. (Lanes that wait while others have gone on to
exchange values with them hang for ever.)
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from tp_mamba.kernels.all_reduce import layout

WINDOW = tl.constexpr(layout.WINDOW)
CELL_BYTES = tl.constexpr(layout.CELL_BYTES)

if knobs.runtime.interpret:

    @triton.jit
    def _fence(word):
        return word

else:

    @triton.jit
    def _fence(word):
        return tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def fence(word):
    """What this program has stored is in memory, for every rank, before what it stores from here on."""
    _fence(word)
    tl.debug_barrier()


@triton.jit
def cells_of(inbox, part, CELLS: tl.constexpr):
    """The address of this program's cells for a round.

    Args:
        inbox: the address of some rank's inbox, int64.
        part: number of the round, of which the lowest bits count.
    """
    i_p = tl.program_id(0).to(tl.int64)
    return inbox + (i_p * WINDOW + (part & (WINDOW - 1))) * (CELLS * CELL_BYTES)


@triton.jit
def _pointer(cell, INT: tl.constexpr):
    """What an address stands for; told to be aligned, for accesses of 16 bytes."""
    return tl.multiple_of(cell.to(tl.pointer_type(INT)), 16)


@triton.jit
def send(
    x, offset, mask, peers, part, cell,
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr, TO_ITSELF: tl.constexpr,
):  # fmt: skip
    """Store a tile ``x`` (16 or 32 bits) into ``cell`` of every other rank's inbox.

    Args:
        offset: of its elements in the cell.
        peers: addresses of the inboxes, by rank.
        TO_ITSELF: also into this rank's own.
    """
    INT: tl.constexpr = tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32
    bits = x.to(INT, bitcast=True)
    bits = tl.where(bits == -1, 0x7FFF if tl.int16 == INT else 0x7FFFFFFF, bits).to(INT)
    for i_r in tl.static_range(SIZE):
        if TO_ITSELF or i_r != RANK:
            p_cell = _pointer(cells_of(peers[i_r], part, CELLS) + cell * CELL_BYTES, INT)
            tl.store(p_cell + offset, bits, mask=mask)


@triton.jit
def _bits_of(cell, offset, mask, DTYPE: tl.constexpr):
    """A tile of a cell as it is now."""
    INT: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    return tl.load(_pointer(cell, INT) + offset, mask=mask, other=0, volatile=True)


@triton.jit
def take(cell, offset, mask, DTYPE: tl.constexpr):
    """The tile in the ``cell`` (its address) of this rank's inbox, once all of it is there."""
    bits = _bits_of(cell, offset, mask, DTYPE)
    while tl.max((bits == -1).to(tl.int32), axis=None) > 0:
        bits = _bits_of(cell, offset, mask, DTYPE)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def sum_of_ranks(own, cells, offset, mask, DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr):
    """The sum over the ranks in rank order, float32, once all terms are there.

    Args:
        own: this rank's term; if RANK is negative it is in its cell like the others.
        cells: the address of the cells.
    """
    if SIZE > 2:
        # One after the other they would each take a way to L2 and back.
        missing = 1
        while missing > 0:
            marks = tl.zeros(offset.shape, tl.int32)
            for i_r in tl.static_range(SIZE):
                if i_r != RANK:
                    marks |= (_bits_of(cells + i_r * CELL_BYTES, offset, mask, DTYPE) == -1).to(tl.int32)
            missing = tl.max(marks, axis=None)
    total = tl.zeros(offset.shape, tl.float32)
    for i_r in tl.static_range(SIZE):
        if i_r == RANK:
            term = own
        elif SIZE > 2:
            term = _bits_of(cells + i_r * CELL_BYTES, offset, mask, DTYPE).to(DTYPE, bitcast=True)
        else:
            term = take(cells + i_r * CELL_BYTES, offset, mask, DTYPE)
        total = term.to(tl.float32) if i_r == 0 else total + term.to(tl.float32)
    return total


@triton.jit
def put_marks(cells, offset, mask, DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Make the cells of all ranks but RANK ready for the round that uses them next."""
    INT: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    marks = tl.full(offset.shape, -1, INT)
    for i_r in tl.static_range(SIZE):
        if i_r != RANK:
            tl.store(_pointer(cells + i_r * CELL_BYTES, INT) + offset, marks, mask=mask)


@triton.jit
def addresses(peers_ptr, SIZE: tl.constexpr):
    """The addresses of the inboxes, by rank. They never change: they may be read before the kernel ahead has ended."""
    peers = ()
    for i_r in tl.static_range(SIZE):
        peers = peers + (tl.load(peers_ptr + i_r),)
    return peers
