"""``dv = dout sigmoid(x @ weight.T + bias)`` in plain torch, float32 inside (float64 for float64)."""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def linear_softplus_backward_cpu(
    dv: torch.Tensor,
    dbias: torch.Tensor | None,
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Write ``dv [T, D]`` and ``dbias [D]`` (or None) from ``dout [T, D]``; the rest as in the forward."""
    dtype = wide_dtype(x.dtype)
    x, weight_t = x.to(dtype), weight.to(dtype).t()
    v = torch.mm(x, weight_t) if bias is None else torch.addmm(bias.to(dtype), x, weight_t)
    exact = torch.ops.aten.softplus_backward(dout.to(dtype), v, 1.0, 20.0)
    if dbias is not None:
        dbias.copy_(exact.sum(0))
    dv.copy_(exact)
