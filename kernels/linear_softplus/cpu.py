"""``softplus(x @ weight.T + bias)`` in plain torch: product and bias in one call, then softplus in place."""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def linear_softplus_cpu(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Same contract as ``any.launch``."""
    dtype = wide_dtype(x.dtype)
    into = out if out.dtype == dtype else None
    x, weight_t = x.to(dtype), weight.to(dtype).t()
    v = (
        torch.mm(x, weight_t, out=into)
        if bias is None
        else torch.addmm(bias.to(dtype), x, weight_t, out=into)
    )
    torch.ops.aten.softplus.out(v, 1.0, 20.0, out=v)
    if v is not out:
        out.copy_(v)
