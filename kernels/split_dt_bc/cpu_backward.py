"""The backward of the split in plain torch, float32 inside (float64 for float64)."""

from __future__ import annotations

import torch

from tp_mamba.kernels.linear.cpu import add_slices_cpu
from tp_mamba.kernels.rms_norm.cpu_backward import rms_norm_backward_cpu


def split_dt_bc_backward_cpu(
    dx: torch.Tensor,
    ddt_weight: torch.Tensor,
    db_weight: torch.Tensor,
    dc_weight: torch.Tensor,
    ddt: torch.Tensor,
    dbc: torch.Tensor,
    x: torch.Tensor | None,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
) -> None:
    """Write ``dx [T, R + 2 N]`` and the gradients of the weights that are there.

    Args:
        ddt, dbc: gradients of dt ``[T, R]`` and of B and C side by side ``[T, 2 N]``.
        x: as in the forward; None without norms.
        dt_weight, b_weight, c_weight, eps: as in the forward.
    """
    R, N = ddt.shape[1], dbc.shape[1] // 2
    if x is None or eps is None:
        dx[:, :R].copy_(ddt)
        dx[:, R:].copy_(dbc)
        return
    if x.dim() == 3:
        x = add_slices_cpu(x)
    douts = (ddt, *dbc.split(N, dim=1))
    weights, dweights = (dt_weight, b_weight, c_weight), (ddt_weight, db_weight, dc_weight)
    parts = zip(dx.split([R, N, N], 1), dweights, douts, x.split([R, N, N], 1), weights, strict=True)
    for dpart, dweight, dout, part, weight in parts:
        into = None if weight is None else dweight
        rms_norm_backward_cpu(dpart, None, into, dout, None, part, None, weight, eps)
