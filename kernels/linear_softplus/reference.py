"""``softplus(x @ weight.T + bias)`` written out: the oracle of the tests.

Computes in float64 for float64 input and in float32 otherwise; the result is cast once, at the end.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def linear_softplus_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``[T, D]`` in the dtype of ``x [T, R]``; ``weight [D, R]``, ``bias [D]``. The threshold of softplus is 20."""
    dtype = wide_dtype(x.dtype)
    v = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        v = v + bias.to(dtype)
    # (Held at 20 in the branch that is not taken above, whose gradient would be NaN where exp is infinite.)
    return torch.where(v <= 20.0, torch.log1p(torch.exp(v.clamp(max=20.0))), v).to(x.dtype)
