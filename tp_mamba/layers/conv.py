"""The causal depthwise convolution of a mixer, cut by channel, with its two calls: sequences, and single tokens."""

from __future__ import annotations

import torch
from torch import nn

from tp_mamba.batch import NULL_SLOT, MambaMetadata
from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.common.limits import check_conv_width
from tp_mamba.layers.init import initialize, uniform
from tp_mamba.layers.linear import check_rank_count
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard


class ColumnParallelConv1d(ShardedModule):
    """Weights ``[D/n, 1, K]`` and bias ``[D/n]`` of a depthwise convolution; no collective either way.

    The shapes are those of ``torch.nn.Conv1d(groups=D)``, which checkpoints follow.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str | None = "silu",
        *,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "",
    ) -> None:
        """Build rank ``tp.rank``'s shard of ``channels`` (D) filters of width ``kernel_size`` (K).

        Args:
            bias: whether there is a bias ``[D]``.
            activation: of the result: ``"silu"``, ``"swish"`` (the same) or None.
            tp, dtype, device: the ranks (default one), and where and how the shard is held.
            prefix: the layer's name in checkpoints and messages.

        Raises:
            ValueError: ``kernel_size`` outside 2..4, or more ranks than channels.
        """
        super().__init__(tp, prefix)
        name = prefix or "conv1d"
        check_conv_width(name, kernel_size)
        check_rank_count(channels, self.tp, name)
        self.channels, self.kernel_size, self.activation = channels, kernel_size, activation
        shard = Shard(shape=(channels, 1, kernel_size), dim=0)
        self.add_parameter("weight", shard, dtype=dtype, device=device)
        if bias:
            self.add_parameter("bias", Shard(shape=(channels,), dim=0), dtype=dtype, device=device)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of ``torch.nn.Conv1d``: uniform over ``+-K^-0.5``, weight and bias."""
        for name in self.shards:
            initialize(self, name, uniform(self.kernel_size**-0.5))

    def forward(
        self, x_TD: torch.Tensor, batch: MambaMetadata, conv_state: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``act(conv(x))`` of a packed batch, decode rows from their window, prefills along their length.

        Args:
            x_TD: ``[T, D/n]``, channels contiguous.
            batch: what the tokens are.
            conv_state: ``[slots, D/n, K-1]``, read and updated in place; None where the batch names no slot.

        Returns:
            ``[T, D/n]``, contiguous.
        """
        u_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        if not batch.num_prefills:
            return self.step(x_TD, batch, conv_state, out=u_TD)
        if not batch.num_padded_decodes:
            return self.prefill(x_TD, batch, conv_state, out=u_TD)
        cut = batch.num_padded_decodes
        self.step(x_TD[:cut], batch, conv_state, out=u_TD[:cut])
        self.prefill(x_TD[cut:], batch, conv_state, out=u_TD[cut:])
        return u_TD

    def step(
        self,
        x_TD: torch.Tensor,
        batch: MambaMetadata,
        conv_state: torch.Tensor | None,
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """One token of each decode row of ``batch``, ``x [P, D/n]``, into ``out``."""
        if conv_state is None:  # no rows
            return out
        causal_conv1d_update(
            x_TD,
            conv_state,
            self.weight.squeeze(1),
            self.bias,
            self.activation,
            conv_state_indices=batch.decode_state_indices,
            pad_slot_id=NULL_SLOT,
            out=out,
        )
        return out

    def prefill(
        self,
        x_TD: torch.Tensor,
        batch: MambaMetadata,
        conv_state: torch.Tensor | None,
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The tokens of the prefills of ``batch``, ``x [T_p, D/n]``, into ``out``."""
        stateful = conv_state is not None
        causal_conv1d_fn(
            x_TD.t(),
            self.weight.squeeze(1),
            self.bias,
            activation=self.activation,
            query_start_loc=batch.prefill_query_start_loc,
            cache_indices=batch.prefill_state_indices if stateful else None,
            has_initial_state=batch.prefill_has_initial_states if stateful else None,
            conv_states=conv_state,
            pad_slot_id=NULL_SLOT,
            out=out.t(),
        )
        return out

    def sequences(
        self, x_TD: torch.Tensor, batch: MambaMetadata, initial_SDK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`forward` for a batch of prefills, with gradients: states come and go as values.

        Args:
            x_TD: ``[T, D/n]``, channels contiguous.
            batch: what the tokens are; its slots are not read.
            initial_SDK: ``[S, D/n, K-1]``, the inputs before each sequence.

        Returns:
            ``u [T, D/n]``, and where there are initial states the last ``K-1`` inputs ``[S, D/n, K-1]``.
        """
        result = causal_conv1d_fn(
            x_TD.t(),
            self.weight.squeeze(1),
            self.bias,
            initial_states=initial_SDK,
            return_final_states=initial_SDK is not None,
            activation=self.activation,
            query_start_loc=batch.prefill_query_start_loc,
        )
        u_DT, final_SDK = result if isinstance(result, tuple) else (result, None)
        return u_DT.t(), final_SDK

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"
