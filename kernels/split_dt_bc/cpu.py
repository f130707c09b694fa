"""dt, B and C cut out of x_proj's output in plain torch, float32 inside (float64 for float64 input)."""

from __future__ import annotations

import torch

from tp_mamba.kernels.linear.cpu import add_slices_cpu
from tp_mamba.kernels.rms_norm.cpu import rms_norm_cpu


def split_dt_bc_cpu(
    dt: torch.Tensor,
    bc: torch.Tensor,
    x: torch.Tensor,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
) -> None:
    """Same contract as ``any.launch``."""
    R, N = dt.shape[1], bc.shape[1] // 2
    if x.dim() == 3:
        x = add_slices_cpu(x.contiguous())  # torch sums rows that lie otherwise in another order
    if eps is None:
        dt.copy_(x[:, :R])
        bc.copy_(x[:, R:])
        return
    parts = x.split([R, N, N], dim=1)
    outs = (dt, *bc.split(N, dim=1))
    for out, part, weight in zip(outs, parts, (dt_weight, b_weight, c_weight), strict=True):
        rms_norm_cpu(out, part, None, None, weight, eps)
