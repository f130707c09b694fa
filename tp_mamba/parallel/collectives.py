"""The four collectives of tensor parallelism, as autograd functions over an explicit group.

Each is the identity for one rank. ``y_r`` is rank r's tensor, ``n`` the number of ranks:

==================  ==================================  ===================================
function            forward                             backward
==================  ==================================  ===================================
`copy_to_tp`        identity                            all-reduce (sum of the gradients)
`reduce_from_tp`    all-reduce (sum)                    identity
`gather_from_tp`    all-gather along ``dim``            this rank's slice along ``dim``
`scatter_to_tp`     this rank's slice along ``dim``     all-gather along ``dim``
==================  ==================================  ===================================

The first two are each other's dual, and so are the last two (the pairs f and g of Megatron-LM,
arXiv:1909.08053, section 3). A gradient is that of a loss computed identically on every rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """What a collective asks of a group: :class:`tp_mamba.parallel.group.TensorParallel`, and nothing above it."""

    rank: int
    size: int
    communicator: Any
    """A :class:`tp_mamba.parallel.communicate.Communicator`."""

    def process_group(self) -> dist.ProcessGroup:
        """The group of more ranks than one."""

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the ranks in place, and return it."""

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's ``x`` along ``dim``."""


def _slice(x: torch.Tensor, tp: Ranks, dim: int) -> torch.Tensor:
    """This rank's of ``n`` equal contiguous slices of ``x`` along ``dim``."""
    size = x.shape[dim] // tp.size
    return x.narrow(dim, tp.rank * size, size).contiguous()


class _CopyToTP(torch.autograd.Function):
    """y_r = x; dx = sum over r of dy_r."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.tp.all_reduce_(grad.clone(memory_format=torch.contiguous_format)), None


class _ReduceFromTP(torch.autograd.Function):
    """y = sum over r of x_r, on every rank; dx_r = dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        return tp.all_reduce_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherFromTP(torch.autograd.Function):
    """y = [x_0 | ... | x_{n-1}] along dim, on every rank; dx_r = slice r of dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Ranks, dim: int) -> torch.Tensor:
        ctx.tp, ctx.dim = tp, dim
        return tp.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _slice(grad, ctx.tp, ctx.dim), None, None


class _ScatterToTP(torch.autograd.Function):
    """y_r = slice r of x along dim; dx = [dy_0 | ... | dy_{n-1}], on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Ranks, dim: int) -> torch.Tensor:
        ctx.tp, ctx.dim = tp, dim
        return _slice(x, tp, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.tp.all_gather(grad, ctx.dim), None, None


def copy_to_tp(x: torch.Tensor, tp: Ranks) -> torch.Tensor:
    """Use a replicated ``x`` (any shape) on every rank. Forward: identity. Backward: all-reduce."""
    return _CopyToTP.apply(x, tp) if tp.size > 1 and x.requires_grad else x


def reduce_from_tp(x: torch.Tensor, tp: Ranks) -> torch.Tensor:
    """Sum partial results ``x`` (any shape, equal on all ranks). Forward: all-reduce. Backward: identity."""
    return x if tp.size == 1 else _ReduceFromTP.apply(x, tp)


def sum_over_tp_(x: torch.Tensor, tp: Ranks) -> torch.Tensor:
    """As :func:`reduce_from_tp`, of a tensor that is the caller's alone: in place where no gradient is tracked."""
    return reduce_from_tp(x, tp) if x.requires_grad else tp.all_reduce_(x)


def gather_from_tp(x: torch.Tensor, tp: Ranks, dim: int = -1) -> torch.Tensor:
    """Join the ranks' equal slices along ``dim``. Forward: all-gather. Backward: this rank's slice."""
    return x if tp.size == 1 else _GatherFromTP.apply(x, tp, dim)


def scatter_to_tp(x: torch.Tensor, tp: Ranks, dim: int = -1) -> torch.Tensor:
    """Keep this rank's slice of a replicated ``x`` along ``dim``. Forward: slice. Backward: all-gather.

    Raises:
        ValueError: the size along ``dim`` is not a multiple of the number of ranks.
    """
    if x.shape[dim] % tp.size:
        raise ValueError(
            f"cannot scatter dim {dim} of size {x.shape[dim]} over {tp.size} ranks: "
            "it must be a multiple of the number of ranks, so pad it first"
        )
    return x if tp.size == 1 else _ScatterToTP.apply(x, tp, dim)
