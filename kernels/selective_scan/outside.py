"""Zeros for the tokens of a packed batch that no sequence has; usually there are none."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import no_type_check

import torch
import triton.language as tl

from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.dialect import jit_by_type
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.selective_scan.tiles import zero_tokens

_BLOCK_D = 256


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def _zero_outside_kernel(
    x_ptr,  # [D, T], any float, out
    start_ptr,  # [S + 1] int
    sequences: tl.int32,
    channels: tl.int32,
    tokens: tl.int64,
    x_stride_d: tl.int64, x_stride_t: tl.int64,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(start_ptr).to(tl.int64)
    stop = tl.load(start_ptr + sequences).to(tl.int64)
    x_ptr += d * x_stride_d
    zero_tokens(x_ptr, x_stride_t, first * 0, first, d < channels)
    zero_tokens(x_ptr, x_stride_t, stop, tokens, d < channels)


def zero_outside(x: torch.Tensor, starts: torch.Tensor) -> None:
    """Zeros in ``x [D, T]`` before the first and after the last of ``starts``."""
    channels, tokens = x.shape
    with on_device_of(x):
        _zero_outside_kernel[(cdiv(channels, _BLOCK_D),)](
            x, starts, len(starts) - 1, channels, tokens, *x.stride(), BLOCK_D=_BLOCK_D
        )
