"""``x @ weight.T`` in one precision throughout: the oracle of the tests, and what serves a CPU.

Computes in float64 for float64 input and in float32 otherwise; the result is rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def skinny_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x [M, K]``, ``weight [N, K]`` -> ``[M, N]`` in ``out_dtype``, by default that of ``x``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype if out_dtype is None else out_dtype)
