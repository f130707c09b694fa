"""A sum that is not finished yet, and its type.

A row-parallel layer computes one term of a sum over the ranks, and a kernel of few rows its terms over slices of the
inner dimension. Whoever consumes the result finishes the sum: plainly, or in one pass with what comes next. So a
fused all-reduce and norm is one more way to finish a :class:`Partial`, and one rank is no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tp_mamba.kernels.linear.cpu import add_slices_cpu
from tp_mamba.parallel.collectives import Ranks


@dataclass(slots=True, eq=False)
class Partial:
    """One rank's term of a sum. It is finished once: its memory may be reused for the result."""

    value: torch.Tensor
    """``[..., H]``, or ``[slices, T, H]`` where :attr:`sliced`; belongs to the Partial alone."""
    tp: Ranks
    """The ranks to sum over."""
    bias: torch.Tensor | None = None
    """``[H]``, added once, after the sum."""
    dtype: torch.dtype | None = None
    """Dtype of the finished sum; by default that of :attr:`value`."""
    sliced: bool = False
    """Whether the first dimension is one of slices, to be added in an aligned binary tree."""

    def sum(self) -> torch.Tensor:
        """The finished sum ``[..., H]``, on every rank."""
        return self.tp.communicator.sum(self)

    def add_and_norm(
        self,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        *,
        residual_in_fp32: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(rms_norm(sum + residual), sum + residual)``; arguments as ``kernels.rms_norm.add_rms_norm``."""
        return self.tp.communicator.add_and_norm(
            self, residual, weight, eps, residual_in_fp32=residual_in_fp32
        )

    def split(
        self,
        time_step_rank: int,
        state_size: int,
        *,
        dt_weight: torch.Tensor | None,
        b_weight: torch.Tensor | None,
        c_weight: torch.Tensor | None,
        eps: float | None,
        dt_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The finished sum as dt, B and C; arguments as ``kernels.split_dt_bc.split_dt_bc``."""
        return self.tp.communicator.split(
            self,
            time_step_rank,
            state_size,
            dt_weight=dt_weight,
            b_weight=b_weight,
            c_weight=c_weight,
            eps=eps,
            dt_dtype=dt_dtype,
        )

    def added_slices(self) -> torch.Tensor:
        """This rank's term ``[..., H]``, its slices added up."""
        return add_slices_cpu(self.value) if self.sliced else self.value
