"""Four neighbours in memory by one load, each a tensor of its own, in whatever layout the addresses have.

``tl.load`` of a row of B for every thread of a channel would give a thread's values as one tensor, and a change of
layout to take it apart. Here every thread loads 16 bytes (8 of a 16-bit type) from its own address; threads with the
same address share one access. The memory must not be written while the kernel runs.

Triton's interpreter knows no inline assembly: there, four plain loads stand in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

if knobs.runtime.interpret:

    @triton.jit
    def load_four(ptr):
        """Elements 0 to 3 behind each pointer, a multiple of four elements: four float32 tensors of ``ptr``'s shape."""
        return (
            tl.load(ptr).to(tl.float32),
            tl.load(ptr + 1).to(tl.float32),
            tl.load(ptr + 2).to(tl.float32),
            tl.load(ptr + 3).to(tl.float32),
        )

else:

    @triton.jit
    def load_four(ptr):
        """Elements 0 to 3 behind each pointer, a multiple of four elements: four float32 tensors of ``ptr``'s shape."""
        address = ptr.to(tl.int64)
        if ptr.dtype.element_ty == tl.float32:
            x = tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [address],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
            )  # fmt: skip
        else:
            dtype = ptr.dtype.element_ty  # no constexpr: Triton 3.6 takes none in a tuple of dtypes
            x = tl.inline_asm_elementwise(
                "ld.global.nc.v4.b16 {$0, $1, $2, $3}, [$4];", "=h,=h,=h,=h,l", [address],
                dtype=(dtype, dtype, dtype, dtype), is_pure=False, pack=1,
            )  # fmt: skip
        return x[0].to(tl.float32), x[1].to(tl.float32), x[2].to(tl.float32), x[3].to(tl.float32)
