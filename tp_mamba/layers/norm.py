"""RMSNorm over the last dimension, with or without a weight, and fused with what comes before it.

That is the residual add, or the cut of x_proj's output into dt, B and C; either finishes a sum that is still a
:class:`~tp_mamba.parallel.partial.Partial`.
"""

from __future__ import annotations

import torch
from torch import nn

from tp_mamba.kernels.rms_norm import rms_norm
from tp_mamba.layers.init import initialize
from tp_mamba.parallel.communicate import add_and_norm, whole_residual
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.partial import Partial, Scattered
from tp_mamba.parallel.sharding import Shard


class RMSNorm(ShardedModule):
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv:1910.07467), float32 inside.

    The weight, if any, is whole on every rank and is applied in float32 before the one cast to the output's
    dtype, as mamba_ssm and vLLM do.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        has_weight: bool = True,
        *,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "",
    ) -> None:
        """A norm over ``hidden_size`` elements; ``has_weight=False`` is FalconMamba's norm of dt, B and C."""
        super().__init__(tp, prefix)
        self.hidden_size, self.eps = hidden_size, eps
        if not has_weight:
            self.register_parameter("weight", None)
        else:
            self.add_parameter("weight", Shard(shape=(hidden_size,)), dtype=dtype, device=device)
            initialize(self, "weight", lambda full: full.fill_(1.0))

    def forward(self, x: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """``x [..., hidden_size]`` -> the same shape, in ``out_dtype`` (default ``x.dtype``)."""
        return rms_norm(x, self.weight, self.eps, out_dtype=out_dtype)

    def add(
        self,
        x: torch.Tensor | Partial | Scattered,
        residual: torch.Tensor | None,
        *,
        residual_in_fp32: bool = True,
        by_rows: bool = False,
    ) -> tuple[torch.Tensor | Scattered, torch.Tensor]:
        """``(norm(x + residual), x + residual)``; the norm in ``x.dtype``, the sum in float32 if asked for.

        Args:
            x: ``[..., hidden_size]``, or a sum of that shape to be finished first; or the rows of it that this rank
                has, for which the results are of these rows alone.
            residual: the same shape, or None before the first layer.
            residual_in_fp32: keep the running sum in float32, and norm it from there.
            by_rows: the caller passes the first result to a layer of ours, which reads it at once, and the second to
                the next norm: they may be lent (:class:`~tp_mamba.parallel.partial.Lent`), and this rank's rows.
        """
        if isinstance(x, Partial):
            x.by_rows = by_rows
            return x.add_and_norm(residual, self.weight, self.eps, residual_in_fp32=residual_in_fp32)
        if isinstance(x, torch.Tensor):
            residual = whole_residual(residual, x, self.tp)
        return add_and_norm(x, residual, self.weight, self.eps, residual_in_fp32=residual_in_fp32)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, has_weight={self.weight is not None}"


def split_and_norm(
    partial: Partial,
    dt_norm: RMSNorm | None,
    b_norm: RMSNorm | None,
    c_norm: RMSNorm | None,
    *,
    time_step_rank: int,
    state_size: int,
    dt_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finish x_proj's sum ``[T, R + 2N]`` and cut it into dt, B and C, each normalised where there are norms.

    Args:
        partial: the sum.
        dt_norm, b_norm, c_norm: over R, N and N elements, with one epsilon; all three or none.
        time_step_rank, state_size: R and N.
        dt_dtype: dtype of dt.

    Returns:
        ``dt [T, R]`` in ``dt_dtype``, ``B`` and ``C [T, N]`` in float32 (float64 in a float64 model).
    """
    return partial.split(
        time_step_rank,
        state_size,
        dt_weight=None if dt_norm is None else dt_norm.weight,
        b_weight=None if b_norm is None else b_norm.weight,
        c_weight=None if c_norm is None else c_norm.weight,
        eps=None if dt_norm is None else dt_norm.eps,
        dt_dtype=dt_dtype,
    )
