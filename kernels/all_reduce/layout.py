"""How the memory lies through which the ranks of one host exchange terms of sums.

Every rank has one inbox, which all ranks write to::

    inbox [PROGRAMS][WINDOW][cells][CELL_BYTES]

Program p of a kernel on one rank talks to program p of the same kernel on the other ranks, and to no other. It works
in rounds: in each it sends one block of its rank's term to every other rank and takes theirs, rank r's from cell r.
Round m goes through part m modulo WINDOW of the program's share. (The sum of a large message over more than two ranks
comes back through as many cells again.)
"""

from __future__ import annotations

PROGRAMS = 256
"""Most programs of a kernel that waits for other ranks, over two ranks; over more it is half of them.

All of them must be on the GPU at once, or those that are would wait for ever for those that are not. So they are two
(or one) for each SM, of so few registers (``launch.py``) that those of another group fit beside them.
"""

WINDOW = 4
"""Rounds of a program whose blocks may lie in an inbox at the same time; a power of two. ``mail.py`` says why four."""

CELL_BYTES = 16384
"""Most bytes of one block: a row of 8192 channels in 16 bits."""

MAX_RANKS = 8
"""GPUs of one host that reach one another's memory."""


ROWS_BYTES = 80 << 20
"""Most bytes of a large sum that goes by shares of rows (``shares.py``): 8192 rows of 4096 in 16 bits, and some."""


def cells(size: int) -> int:
    """Cells of one round: one per rank, and for more than two ranks as many again for finished sums."""
    return size if size == 2 else 2 * size


def most_programs(size: int, sm_count: int) -> int:
    """Programs of an exchange over ``size`` ranks, the least of whose GPUs has so many SMs."""
    return min(PROGRAMS, 2 * sm_count) if size == 2 else min(PROGRAMS // 2, sm_count)


def inbox_bytes(size: int, programs: int) -> int:
    """Size of a rank's inbox: 32 MiB for two ranks with all programs, 64 MiB for four, 128 MiB for eight."""
    return programs * WINDOW * cells(size) * CELL_BYTES


def terms_bytes(size: int) -> int:
    """Room at one rank for the other ranks' terms of its share of such a sum."""
    return ROWS_BYTES // size // 16 * 16 * (size - 1)
