"""The backward of RMSNorm in plain torch, float32 inside (float64 for float64)."""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def rms_norm_backward_cpu(
    dx: torch.Tensor,
    dresidual: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dout: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Write ``dx`` and ``dresidual [T, H]`` and ``dweight [H]``; all but ``dx`` may be None.

    Args:
        dout, dsum: the gradients of the norm and of the sum ``x + residual``, ``[T, H]``; dsum may be None.
        x, residual, weight, eps: as in the forward.
    """
    dtype = wide_dtype(x.dtype)
    total = x.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    scale = total.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    normed = total * scale
    d = dout.to(dtype)
    if dweight is not None:
        dweight.copy_((d * normed).sum(0))
    if weight is not None:
        d = d * weight.to(dtype)
    mean = (d * normed).mean(dim=-1, keepdim=True)
    ds = torch.addcmul(d, normed, mean, value=-1).mul_(scale)
    if dsum is not None:
        ds.add_(dsum)
    dx.copy_(ds)
    if dresidual is not None:
        dresidual.copy_(ds)
