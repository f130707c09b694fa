"""The weights of the depthwise causal convolution, cut by channel."""

from __future__ import annotations

import torch
from torch import nn

from tp_mamba.layers.init import initialize, uniform
from tp_mamba.layers.linear import check_rank_count
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard


class ColumnParallelConv1d(ShardedModule):
    """Weights ``[D/n, 1, K]`` and bias ``[D/n]`` of a depthwise convolution; no collective either way.

    It holds parameters only: the mixer hands them to ``tp_mamba.kernels.causal_conv1d`` together with its
    state. The shapes are those of ``torch.nn.Conv1d(groups=D)``, which checkpoints follow.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "",
    ) -> None:
        """Build rank ``tp.rank``'s shard of ``channels`` (D) filters of width ``kernel_size`` (K).

        Raises:
            ValueError: ``kernel_size`` outside 2..4, or more ranks than channels.
        """
        super().__init__(tp, prefix)
        name = prefix or "conv1d"
        if not 2 <= kernel_size <= 4:
            raise ValueError(
                f"{name}: got a convolution width of {kernel_size}, the kernels serve widths 2, 3 and 4"
            )
        check_rank_count(channels, self.tp, name)
        self.channels, self.kernel_size = channels, kernel_size
        shard = Shard(shape=(channels, 1, kernel_size), dim=0)
        self.weight = self.add_parameter("weight", shard, dtype=dtype, device=device)
        self.bias: nn.Parameter | None = None
        if bias:
            shard = Shard(shape=(channels,), dim=0)
            self.bias = self.add_parameter("bias", shard, dtype=dtype, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of ``torch.nn.Conv1d``: uniform over ``+-K^-0.5``, weight and bias."""
        draw = uniform(self.kernel_size**-0.5)
        for name in self.shards:
            initialize(self, name, draw)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"
