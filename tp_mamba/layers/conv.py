"""The weights of the depthwise causal convolution, cut by channel."""

from __future__ import annotations

import torch
from torch import nn

from tp_mamba.layers.init import initialize, uniform
from tp_mamba.layers.linear import check_rank_count
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.parallel.sharding import Split, declare


class ColumnParallelConv1d(nn.Module):
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
        super().__init__()
        name = prefix or "conv1d"
        if not 2 <= kernel_size <= 4:
            raise ValueError(
                f"{name}: got a convolution width of {kernel_size}, the kernels serve widths 2, 3 and 4"
            )
        self.tp = checked(tp)
        check_rank_count(channels, self.tp, name)
        self.channels, self.kernel_size = channels, kernel_size
        split = Split(shape=(channels, 1, kernel_size), dim=0)
        self.weight = nn.Parameter(torch.empty(split.local_shape(self.tp.size), dtype=dtype, device=device))
        declare(self.weight, split, self.tp, name=f"{name}.weight")
        self.bias: nn.Parameter | None = None
        if bias:
            split = Split(shape=(channels,), dim=0)
            self.bias = nn.Parameter(torch.empty(split.local_shape(self.tp.size), dtype=dtype, device=device))
            declare(self.bias, split, self.tp, name=f"{name}.bias")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of ``torch.nn.Conv1d``: uniform over ``+-K^-0.5``, weight and bias."""
        draw = uniform(self.kernel_size**-0.5)
        initialize(self.weight, draw)
        if self.bias is not None:
            initialize(self.bias, draw)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"
