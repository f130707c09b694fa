"""RMSNorm and RMSNorm with residual add, written out: the oracle of the tests.

Computes in float64 for float64 input and in float32 otherwise; the result is cast once, at the end.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of ``x [..., H]``."""
    x_in = x.to(wide_dtype(x.dtype))
    y = x_in / torch.sqrt((x_in * x_in).mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(out_dtype or x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual_in_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, and that sum, which the norm sees before it is rounded."""
    dtype = wide_dtype(x.dtype)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    keep = dtype if residual_in_fp32 else x.dtype
    return rms_norm_reference(total, weight, eps, out_dtype=out_dtype or x.dtype), total.to(keep)
