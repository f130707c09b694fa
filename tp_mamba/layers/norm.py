"""RMSNorm over the last dimension, with or without a weight, and fused with the residual add."""

from __future__ import annotations

import torch
from torch import nn

from tp_mamba.kernels.rms_norm import add_rms_norm, rms_norm
from tp_mamba.layers.init import initialize
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard


class RMSNorm(ShardedModule):
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv:1910.07467), float32 inside.

    The weight, if any, is whole on every rank and is applied in float32 before the one cast to the output's
    dtype, as mamba_ssm and vLLM do.
    """

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
        self.weight: nn.Parameter | None = None
        if has_weight:
            self.weight = self.add_parameter(
                "weight", Shard(shape=(hidden_size,)), dtype=dtype, device=device
            )
            initialize(self, "weight", lambda full: full.fill_(1.0))

    def forward(self, x: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """``x [..., hidden_size]`` -> the same shape, in ``out_dtype`` (default ``x.dtype``)."""
        return rms_norm(x, self.weight, self.eps, out_dtype=out_dtype)

    def add(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        *,
        residual_in_fp32: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(norm(x + residual), x + residual)``; the norm in ``x.dtype``, the sum in float32 if asked for.

        Args:
            x: ``[..., hidden_size]``.
            residual: the same shape, or None before the first layer.
            residual_in_fp32: keep the running sum in float32, and norm it from there.
        """
        return add_rms_norm(x, residual, self.weight, self.eps, residual_in_fp32=residual_in_fp32)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, has_weight={self.weight is not None}"
