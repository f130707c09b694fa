"""A Triton kernel that does nothing but exponentials, with as many on their way as the unit takes."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import ex2

_BLOCK, _WARPS = 1024, 4
_PROGRAMS = 16
"""A multiprocessor, all at once: 64 warps of eight chains per thread."""
_ROUNDS = 4096


@triton.jit
def _exponentials_kernel(out_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = at.to(tl.float32) / BLOCK
    for _ in range(ROUNDS):
        x = ex2(-x)  # stays between 0 and 1; the sign is issued between two exponentials
    tl.store(out_ptr + tl.program_id(0) * BLOCK + at, x)


def launch(device: torch.device) -> int:
    """Run the kernel on all of ``device``; returns how many exponentials that are."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS
    out = torch.empty(programs * _BLOCK, device=device)
    with torch.cuda.device(device):
        _exponentials_kernel[(programs,)](out, _ROUNDS, _BLOCK, num_warps=_WARPS)
    return programs * _BLOCK * _ROUNDS
