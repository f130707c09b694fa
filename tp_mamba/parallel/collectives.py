"""The collectives of tensor parallelism, as autograd functions over an explicit group.

Each is the identity for one rank. ``y_r`` is rank r's tensor, ``n`` the number of ranks:

====================  ==================================  ======================================
function              forward                             backward
====================  ==================================  ======================================
`copy_to_tp`          identity                            all-reduce (sum of the gradients)
`copy_all_to_tp`      identity of several tensors         one all-reduce of all their gradients
`reduce_from_tp`      all-reduce (sum)                    identity
`gather_from_tp`      all-gather along ``dim``            this rank's slice along ``dim``
`scatter_to_tp`       this rank's slice along ``dim``     all-gather along ``dim``
`gather_rows`         all-gather of row shares            reduce-scatter (sum of the gradients)
`reduce_to_rows`      reduce-scatter (sum) to row shares  all-gather
====================  ==================================  ======================================

The first and the third are each other's dual, and so are `gather_from_tp` and `scatter_to_tp` (the pairs f and g of
Megatron-LM, arXiv:1909.08053, section 3), and the last two (its sequence parallelism, arXiv:2205.05198, section 4.2).
A gradient is that of a loss computed identically on every rank.

A forward pass that is computed again for its backward (:mod:`tp_mamba.layers.recompute`) need not communicate again:
under :class:`ReduceTape` the results of `reduce_from_tp` are kept the first time and given again the second.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
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

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's share of the rows of the sum of ``x`` over the ranks."""


class ReduceTape:
    """Results of `reduce_from_tp`, kept by one forward pass for the same pass when it is computed again."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._next: int | None = None

    def record(self) -> AbstractContextManager[None]:
        """Keep the sums that the body takes over the ranks."""
        return _Taped(self, None)

    def replay(self) -> AbstractContextManager[None]:
        """Give them again, in order, to a body that asks for the same sums; as often as it is entered."""
        return _Taped(self, 0)

    def sum(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        """The sum of ``x`` over the ranks: from the tape where it replays."""
        if self._next is None:
            summed = _sum(x, tp)
            self._kept.append(summed.detach())
            return summed
        self._next += 1
        return self._kept[self._next - 1].detach()


class _Taped(AbstractContextManager[None]):
    def __init__(self, tape: ReduceTape, start: int | None) -> None:
        self._tape, self._start = tape, start

    def __enter__(self) -> None:
        self._tape._next = self._start
        self._token = _TAPE.set(self._tape)

    def __exit__(self, *_: object) -> None:
        _TAPE.reset(self._token)


_TAPE: ContextVar[ReduceTape | None] = ContextVar("tp_mamba_reduce_tape", default=None)


def _sum(x: torch.Tensor, tp: Ranks) -> torch.Tensor:
    return tp.all_reduce_(x.clone(memory_format=torch.contiguous_format))


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
        return _sum(grad, ctx.tp), None


class _CopyAllToTP(torch.autograd.Function):
    """y_i,r = x_i for tensors i ``[T, k_i]``; ``[dx_0 | dx_1 | ..] = sum over r of [dy_0,r | dy_1,r | ..]``.

    The message ``[T, sum k_i]`` is in the widest of their dtypes.
    """

    @staticmethod
    def forward(ctx: Any, tp: Ranks, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tp, ctx.dtypes = tp, [x.dtype for x in tensors]
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wide = ctx.dtypes[0]
        for dtype in ctx.dtypes:
            wide = torch.promote_types(wide, dtype)
        message = torch.cat([grad.to(wide) for grad in grads], dim=-1)
        parts = ctx.tp.all_reduce_(message).split([grad.shape[-1] for grad in grads], dim=-1)
        return None, *(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True))


class _ReduceFromTP(torch.autograd.Function):
    """y = sum over r of x_r, on every rank; dx_r = dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        tape = _TAPE.get()
        return _sum(x, tp) if tape is None else tape.sum(x, tp)

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


class _GatherRows(torch.autograd.Function):
    """y = rows [x_0; ..; x_{n-1}] up to ``rows``, on every rank; dx_r = share r of sum over ranks of dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Ranks, rows: int) -> torch.Tensor:
        ctx.tp, ctx.share = tp, len(x)
        return tp.all_gather(x, dim=0)[:rows]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.tp.reduce_scatter(_padded_rows(grad, ctx.share * ctx.tp.size)), None, None


class _ReduceToRows(torch.autograd.Function):
    """y_r = share r of the rows of sum over ranks of x; dx = [dy_0; ..; dy_{n-1}], on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        ctx.tp, ctx.rows = tp, len(x)
        return tp.reduce_scatter(_padded_rows(x, -(-len(x) // tp.size) * tp.size))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.tp.all_gather(grad, dim=0)[: ctx.rows], None


def _padded_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` with zero rows at its end, ``rows`` in all, contiguous."""
    if len(x) == rows:
        return x.contiguous()
    padded = x.new_zeros(rows, *x.shape[1:])
    padded[: len(x)] = x
    return padded


def copy_to_tp(x: torch.Tensor, tp: Ranks) -> torch.Tensor:
    """Use a replicated ``x`` (any shape) on every rank. Forward: identity. Backward: all-reduce."""
    return _CopyToTP.apply(x, tp) if tp.size > 1 and x.requires_grad else x


def copy_all_to_tp(tensors: tuple[torch.Tensor, ...], tp: Ranks) -> tuple[torch.Tensor, ...]:
    """Use replicated ``tensors``, ``[T, k]`` each, on every rank. Forward: identity. Backward: one all-reduce."""
    if tp.size == 1 or not any(x.requires_grad for x in tensors):
        return tensors
    return _CopyAllToTP.apply(tp, *tensors)


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


def gather_rows(x: torch.Tensor, tp: Ranks, rows: int) -> torch.Tensor:
    """Join the ranks' row shares ``[ceil(rows / n), ..]`` to ``[rows, ..]`` for use on every rank.

    Forward: all-gather. Backward: reduce-scatter of the gradients, of which each rank has its own.
    """
    return x[:rows] if tp.size == 1 else _GatherRows.apply(x, tp, rows)


def reduce_to_rows(x: torch.Tensor, tp: Ranks) -> torch.Tensor:
    """Sum partial results ``x [T, ..]`` and keep this rank's row share ``[ceil(T / n), ..]``, padded with zero rows.

    Forward: reduce-scatter. Backward: all-gather.
    """
    return x if tp.size == 1 else _ReduceToRows.apply(x, tp)
