"""RMSNorm in plain torch: few passes over memory, float32 inside (float64 for float64 input)."""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def rms_norm_cpu(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    new_residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Same contract as ``any.launch``."""
    dtype = wide_dtype(x.dtype)
    total = x.to(dtype)
    if residual is not None:
        # Straight into its destination where that has the precision of the sum.
        exact = new_residual is not None and new_residual.dtype == dtype
        total = torch.add(total, residual.to(dtype), out=new_residual if exact else None)
    if new_residual is not None and new_residual is not total:
        new_residual.copy_(total)
    # mean() sums pairwise; vector_norm saves a pass but sums in sequence: five times the error at H 4096.
    scale = total.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    normed = torch.mul(total, scale, out=out if out.dtype == dtype else None)
    if weight is not None:
        normed.mul_(weight.to(dtype))
    if normed is not out:
        out.copy_(normed)
