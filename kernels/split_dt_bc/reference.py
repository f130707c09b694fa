"""dt, B and C cut out of x_proj's output, and their norms, written out: the oracle of the tests."""

from __future__ import annotations

import torch

from tp_mamba.kernels.linear.reference import add_slices
from tp_mamba.kernels.rms_norm.reference import rms_norm_reference


def split_dt_bc_reference(
    x: torch.Tensor,
    time_step_rank: int,
    state_size: int,
    *,
    dt_weight: torch.Tensor | None = None,
    b_weight: torch.Tensor | None = None,
    c_weight: torch.Tensor | None = None,
    eps: float | None = None,
    dt_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x [T, R + 2 N]`` -> ``dt [T, R]`` in ``dt_dtype``, ``B`` and ``C [T, N]`` in float32 (float64 for float64).

    The slices of ``x [slices, T, R + 2 N]`` are added first.
    """
    if x.dim() == 3:
        x = add_slices(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = x.split([time_step_rank, state_size, state_size], dim=1)
    dtypes = (dt_dtype or x.dtype, wide, wide)
    if eps is None:
        dt, B, C = (part.to(dtype, copy=True) for part, dtype in zip(parts, dtypes, strict=True))
    else:
        dt, B, C = (
            rms_norm_reference(part, weight, eps, out_dtype=dtype)
            for part, weight, dtype in zip(parts, (dt_weight, b_weight, c_weight), dtypes, strict=True)
        )
    return dt, B, C
