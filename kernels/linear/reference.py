"""``x @ weight.T`` in one precision throughout: the oracle of the tests, and what serves a CPU.

Computes in float64 for float64 input and in float32 otherwise; the result is rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tp_mamba.kernels.linear.launch import slice_width, slices_launch


def skinny_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x [M, K]``, ``weight [N, K]`` -> ``[M, N]`` in ``out_dtype``, by default that of ``x``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype if out_dtype is None else out_dtype)


def slices_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The products over each group of slices of K, ``[groups, M, N]`` in float32 (float64 for float64 ``x``)."""
    width = slice_width(*weight.shape) * slices_launch(1, *weight.shape).group
    cuts = zip(x.split(width, dim=1), weight.split(width, dim=1), strict=True)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.stack([skinny_linear_reference(*cut, out_dtype=dtype) for cut in cuts])


def add_slices(sums: torch.Tensor) -> torch.Tensor:
    """``[slices, ...]`` -> ``[...]``, added in an aligned binary tree: pairs of neighbours, then pairs of those."""
    while len(sums) > 1:
        pairs = len(sums) // 2 * 2
        sums = torch.cat([sums[0:pairs:2] + sums[1:pairs:2], sums[pairs:]])
    return sums[0]
