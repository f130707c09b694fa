"""How both passes of the backward cut sequences in time: segments of as many tokens wherever a sequence begins."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_of(start_ptr, row, sequences, length, EVERY: tl.constexpr, VARLEN: tl.constexpr):
    """``(sequence, its first token, its length, the row of its first segment)`` of the segment in a row.

    As with saved states, segment k of a sequence that begins at token f is in row ``f // EVERY + sequence + k``. Rows
    that no segment is in belong to the sequence before them, behind its end.
    """
    if VARLEN:
        low = row * 0
        high = low + sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            here = tl.load(start_ptr + middle).to(tl.int64) // EVERY + middle <= row
            low = tl.where(here, middle, low)
            high = tl.where(here, high, middle - 1)
        first = tl.load(start_ptr + low).to(tl.int64)
        steps = tl.load(start_ptr + low + 1).to(tl.int64) - first
        first_row = first // EVERY + low
    else:
        each = (length - 1) // EVERY + 1
        low = row // each
        first = low * 0
        steps = first + length
        first_row = low * each
    return low, first, steps, first_row
