"""A sum that is not finished yet, and its type.

A row-parallel layer computes one term of a sum over the ranks, and a kernel of few rows its terms over slices of the
inner dimension. Whoever consumes the result finishes the sum: plainly, or in one pass with what comes next. So a
fused all-reduce and norm is one more way to finish a :class:`Partial`, and one rank is no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tp_mamba.kernels.linear.cpu import add_slices_cpu
from tp_mamba.parallel.collectives import Ranks, copy_to_tp, gather_rows


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
    begun: int | None = None
    """Rows of the sum where the ranks are exchanging its terms already; :attr:`value` is then of this rank's rows."""
    by_rows: bool = False
    """Whether whoever finishes it by :meth:`add_and_norm` takes what that lends, and a residual of this rank's rows."""

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
    ) -> tuple[torch.Tensor | Scattered, torch.Tensor]:
        """``(rms_norm(sum + residual), sum + residual)``; arguments as ``kernels.rms_norm.add_rms_norm``.

        Both are whole on every rank, or both are row shares, as the communicator finishes it; it takes the residual
        as it gave it.
        """
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

    def reduce(self) -> torch.Tensor | Scattered:
        """The finished sum, as :meth:`add_and_norm` begins: whole, or this rank's rows."""
        return self.tp.communicator.reduce(self)

    def added_slices(self) -> torch.Tensor:
        """This rank's term ``[..., H]``, its slices added up."""
        return add_slices_cpu(self.value) if self.sliced else self.value


@dataclass(slots=True, eq=False)
class Scattered:
    """Rows of a tensor that are divided over the ranks: what a norm gives where it works on a share of the tokens.

    A layer that takes it gathers the rows, and its own gradient is a sum over the ranks: :func:`whole`.
    """

    value: torch.Tensor
    """``[ceil(T / n), H]``: this rank's rows, zero-padded at the end of the last rank's."""
    tp: Ranks
    """The ranks that have the others."""
    rows: int
    """``T``"""

    def __len__(self) -> int:
        return self.rows

    def dim(self) -> int:
        """2, as of the whole tensor."""
        return self.value.dim()

    @property
    def shape(self) -> torch.Size:
        """``[T, H]``"""
        return torch.Size((self.rows, *self.value.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def requires_grad(self) -> bool:
        return self.value.requires_grad


@dataclass(slots=True, eq=False)
class Lent(Scattered):
    """What a norm gives where each rank norms its rows and sends them: all rows, in memory that is the group's.

    :attr:`value` is ``[T, H]``. It stands until the next sum of this kind, so that it is read at once, or copied; and
    rows other than this rank's are there once they have been waited for. No gradient.
    """

    own: slice
    """This rank's rows."""
    wait: Callable[[], None]
    """Has the current stream wait for the other ranks'."""

    def pieces(self) -> Iterator[slice]:
        """All rows in the order in which they can be read: at once this rank's, then the others'."""
        yield self.own
        self.wait()
        for rows in (slice(0, self.own.start), slice(self.own.stop, self.rows)):
            if rows.start < rows.stop:
                yield rows


def whole(x: torch.Tensor | Scattered, tp: Ranks) -> torch.Tensor:
    """``x``, replicated or divided by rows, whole on every rank for a layer that is cut over them.

    Forward: identity, or all-gather. Backward: all-reduce of the layer's gradients, or reduce-scatter. Rows that are
    lent come as they are: the layer reads them before it begins a sum.
    """
    if isinstance(x, Lent):
        x.wait()
        return x.value
    return gather_rows(x.value, x.tp, x.rows) if isinstance(x, Scattered) else copy_to_tp(x, tp)


def _opened(x: Partial | Scattered) -> tuple[list[Any], Any]:
    if isinstance(x, Partial):
        return [x.value, x.bias], (x.tp, x.dtype, x.sliced, x.begun, x.by_rows)
    return [x.value], (x.tp, x.rows)


def _closed_partial(tensors: Iterable[Any], rest: Any) -> Partial:
    (value, bias), (tp, *options) = tensors, rest
    return Partial(value, tp, bias, *options)


def _closed_scattered(tensors: Iterable[Any], rest: Any) -> Scattered:
    return Scattered(*tensors, *rest)


# FSDP2 hooks the tensors that a module takes and returns, which it finds through pytree.
pytree.register_pytree_node(Partial, _opened, _closed_partial)
pytree.register_pytree_node(Scattered, _opened, _closed_scattered)
