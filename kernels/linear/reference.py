"""``x @ weight.T`` written out, a few columns after another: the oracle of the tests.

Computes in float64 for float64 input and in float32 otherwise; the result is rounded once, at the end.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x [M, k]``, ``weight [out, k]`` -> ``[M, out]`` in ``out_dtype``, by default that of ``x``."""
    dtype = wide_dtype(x.dtype)
    y = torch.zeros(len(x), len(weight), dtype=dtype, device=x.device)
    for x_part, weight_part in zip(x.split(64, dim=1), weight.split(64, dim=1), strict=True):
        y += torch.einsum("mk,ok->mo", x_part.to(dtype), weight_part.to(dtype))
    return y.to(x.dtype if out_dtype is None else out_dtype)


def slices_reference(x: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
    """The products over each ``width`` columns, ``[slices, M, out]`` in float32 (float64 for float64 ``x``)."""
    cuts = zip(x.split(width, dim=1), weight.split(width, dim=1), strict=True)
    return torch.stack([linear_reference(*cut, out_dtype=wide_dtype(x.dtype)) for cut in cuts])


def add_slices(sums: torch.Tensor) -> torch.Tensor:
    """``[slices, ...]`` -> ``[...]``, added in an aligned binary tree: pairs of neighbours, then pairs of those."""
    while len(sums) > 1:
        pairs = len(sums) // 2 * 2
        sums = torch.cat([sums[0:pairs:2] + sums[1:pairs:2], sums[pairs:]])
    return sums[0]
