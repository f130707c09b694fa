"""FSDP2 over the data axis of a model that is already split over the tensor axis, and what the optimizer sees of it.

FSDP2 keeps each data rank's part of the float32 master parameters, gathers them in the compute dtype block by block,
and reduces their gradients in float32. What :func:`tp_mamba.training.layout.data_dim` leaves whole on every data
rank, the parameters per channel (A_log, D, convolution, biases), is not FSDP2's: their gradients are averaged here, in
one collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut

from tp_mamba.models.base import CausalLM
from tp_mamba.parallel.sharding import Shard, ShardedTensor, sharded_tensors
from tp_mamba.training.layout import Layout, data_dim, layout_of
from tp_mamba.training.ranks import DATA, Ranks


@dataclass(frozen=True, slots=True)
class Master:
    """One master parameter as this rank holds it."""

    name: str
    """In a checkpoint."""
    shard: Shard
    layout: Layout
    over_data: bool
    """Whether the data ranks hold different parts of it."""
    parameter: nn.Parameter
    """The model's, a DTensor of FSDP2's or a plain one, whose gradient backward leaves."""
    local: nn.Parameter
    """What this rank holds of it, in the same memory: the optimizer's."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to A_log, D, biases and norms."""
        return not self.shard.wide and len(self.shard.shape) > 1

    def take_gradient(self) -> None:
        """Give the optimizer's parameter the gradient of the model's."""
        grad = self.parameter.grad
        self.local.grad = grad.to_local() if isinstance(grad, DTensor) else grad


def shard_over_data(model: CausalLM, ranks: Ranks, dtype: torch.dtype) -> None:
    """Hand the parameters of ``model`` to FSDP2 where there are data ranks.

    Args:
        model: with float32 parameters and a method ``loss``.
        dtype: what it computes in.
    """
    if ranks.mesh is None or ranks.dp.size == 1:
        return
    cut: dict[nn.Parameter, int] = {}
    whole: set[nn.Parameter] = set()
    for tensor in sharded_tensors(model):
        dim, parameter = data_dim(tensor.shard, ranks.tp.size, ranks.dp.size), _parameter(tensor)
        if dim is None:
            whole.add(parameter)
        else:
            cut[parameter] = dim
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    for module in (*model.backbone.layers, model):
        fully_shard(
            module,
            mesh=ranks.mesh[DATA],
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Cut(cut[parameter]),
            ignored_params=whole,
        )
    register_fsdp_forward_method(model, "loss")


def masters_of(model: CausalLM, ranks: Ranks) -> list[Master]:
    """The parameters of ``model`` in its order, a shared one once; after :func:`shard_over_data`."""
    rank, n, M = ranks.tp.rank, ranks.tp.size, ranks.dp.size
    found = []
    for tensor in sharded_tensors(model):
        parameter = _parameter(tensor)
        local = parameter
        if isinstance(parameter, DTensor):
            local = nn.Parameter(parameter.to_local().detach())
        layout = layout_of(tensor.shard, rank, n, M)
        found.append(
            Master(tensor.name, tensor.shard, layout, isinstance(parameter, DTensor), parameter, local)
        )
    return found


def average_over_data(masters: Sequence[Master], ranks: Ranks) -> None:
    """Average the gradients of what every data rank holds whole, as FSDP2 averages those of the rest."""
    if ranks.dp.size == 1:
        return
    grads = [
        master.local.grad for master in masters if not master.over_data and master.local.grad is not None
    ]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    ranks.dp.all_reduce_(flat).div_(ranks.dp.size)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def _parameter(tensor: ShardedTensor) -> nn.Parameter:
    parameter = tensor.param
    assert isinstance(parameter, nn.Parameter)
    return parameter
