"""The Triton dialect of all kernels here, and the helpers that every kernel file may use.

Names: an argument is ``x_ptr`` (with a comment: shape, dtype, in or out) and ``x_stride_t``; a program's index is
``i_t`` (int64 before it enters an address), its first element ``first_t``, the offsets in its block ``t`` (the letters
of the design: ``b`` row of a batch, ``s`` sequence or slot, ``t`` token, ``d`` channel, ``n`` state, ``r`` rank, ``k``
inner dimension of a product). A tile of pointers is ``p_x``, a mask ``d_mask``, the loaded tile ``x``. Compile-time
constants are in capitals: block sizes ``BLOCK_D``, flags ``HAS_Z``, sizes by their letter. No ``make_block_ptr``.

Kernel arguments come in the order: tensors, sizes, strides, constants, ``PDL`` last.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def jit_by_type(kernel: Callable[..., None]) -> Any:
    """``triton.jit`` for a kernel that is specialized by dtypes and constexprs alone.

    A new length, batch or slot count, or an odd offset into a buffer, then finds the kernel compiled.
    """
    runtime = [
        p.name for p in inspect.signature(kernel).parameters.values() if "constexpr" not in str(p.annotation)
    ]
    return triton.jit(kernel, do_not_specialize=runtime)


@triton.jit
def add(x, y):
    """What a reduction or a scan over threads combines with."""
    return x + y


@triton.jit
def tree_of(tiles, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """The sum of ``tiles[FIRST : FIRST + SIZE]``, SIZE a power of two, in the order of an aligned binary tree."""
    if SIZE == 1:
        total = tiles[FIRST]
    else:
        total = tree_of(tiles, FIRST, SIZE // 2) + tree_of(tiles, FIRST + SIZE // 2, SIZE // 2)
    return total


@triton.jit
def tree_at(ptr, stride, mask, FIRST: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """:func:`tree_of` for COUNT tiles in memory, ``stride`` apart; SIZE is the power of two from COUNT."""
    if SIZE == 1:
        total = tl.load(ptr + FIRST * stride, mask=mask, other=0.0)
    elif FIRST + SIZE // 2 < COUNT:
        total = tree_at(ptr, stride, mask, FIRST, SIZE // 2, COUNT) + tree_at(
            ptr, stride, mask, FIRST + SIZE // 2, SIZE // 2, COUNT
        )
    else:
        total = tree_at(ptr, stride, mask, FIRST, SIZE // 2, COUNT)
    return total
