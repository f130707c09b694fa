"""How the ranks of a group communicate, and how a sum over them is finished.

A :class:`~tp_mamba.parallel.group.TensorParallel` carries a :class:`Communicator`. A subclass of it changes how: other
transports override the two collectives, fused kernels override a way to finish a
:class:`~tp_mamba.parallel.partial.Partial`. It is passed as ``TensorParallel(group, communicator=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.parallel.collectives import Ranks, copy_to_tp, gather_rows, sum_over_tp_
from tp_mamba.parallel.partial import Partial, Scattered

# Functions that torch 2.13 renamed, where the older names warn.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def add_and_norm(
    x: torch.Tensor | Scattered,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual_in_fp32: bool,
) -> tuple[torch.Tensor | Scattered, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)`` of whole rows on every rank, or of this rank's share of them.

    A weight that meets only a share of the rows gets a gradient that is summed over the ranks.
    """
    if not isinstance(x, Scattered):
        return add_rms_norm(x, residual, weight, eps, residual_in_fp32=residual_in_fp32)
    weight = None if weight is None else copy_to_tp(weight, x.tp)
    normed, residual = add_rms_norm(x.value, residual, weight, eps, residual_in_fp32=residual_in_fp32)
    return Scattered(normed, x.tp, x.rows), residual


def whole_residual(residual: torch.Tensor | None, x: torch.Tensor, tp: Ranks) -> torch.Tensor | None:
    """``residual`` for an ``x`` whose rows are all here: gathered, where a norm before left each rank its own rows."""
    if residual is None or x.dim() != 2 or residual.shape[0] == x.shape[0]:
        return residual
    return gather_rows(residual, tp, x.shape[0])


class Communicator:
    """The collectives of ``torch.distributed``, and sums that are finished by one of them and a kernel behind it."""

    def all_reduce_(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        """Sum ``x`` (any shape, contiguous) over the ranks, in place, and return it.

        Called for two ranks and more; one rank's sum is its own term.
        """
        dist.all_reduce(x, group=tp.process_group())
        return x

    def all_gather(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        """Every rank's contiguous ``x`` (equal shapes) as ``[n, *x.shape]``, in rank order; for two and more."""
        gathered = x.new_empty((tp.size, *x.shape))
        _all_gather_single(gathered.flatten(0, 1), x, group=tp.process_group())
        return gathered

    def reduce_scatter(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        """Sum contiguous ``x [n t, ..]`` over the ranks; ``[t, ..]``, the rank's own rows. For two and more."""
        share = x.new_empty(len(x) // tp.size, *x.shape[1:])
        _reduce_scatter_single(share, x, group=tp.process_group())
        return share

    def begin(
        self,
        product: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        columns: int,
        tp: Ranks,
        bias: torch.Tensor | None,
    ) -> Partial:
        """The Partial of ``product(x)``, rows ``[.., k]`` to ``[.., columns]``, whose rows may be computed in pieces.

        A communicator may send what is there of it while the rest is computed.
        """
        return Partial(product(x), tp, bias)

    def takes_slices(self, tp: Ranks) -> bool:
        """Whether :meth:`split` adds up the slices of a Partial in its own pass.

        Where ranks are summed in between they must be added before, which the kernel of the product does best.
        """
        return tp.size == 1

    def sum(self, partial: Partial) -> torch.Tensor:
        """The finished sum: over slices, then over ranks; cast once, then the bias."""
        y = sum_over_tp_(partial.added_slices(), partial.tp)
        if partial.dtype is not None:
            y = y.to(partial.dtype)
        return y if partial.bias is None else y + partial.bias.to(y.dtype)

    def reduce(self, partial: Partial) -> torch.Tensor | Scattered:
        """The finished sum as the norm behind it is to take it: whole, or this rank's share of its rows."""
        return self.sum(partial)

    def add_and_norm(
        self,
        partial: Partial,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        *,
        residual_in_fp32: bool,
    ) -> tuple[torch.Tensor | Scattered, torch.Tensor]:
        """``(rms_norm(sum + residual), sum + residual)``; see :meth:`Partial.add_and_norm`."""
        return add_and_norm(self.reduce(partial), residual, weight, eps, residual_in_fp32=residual_in_fp32)

    def split(
        self,
        partial: Partial,
        time_step_rank: int,
        state_size: int,
        *,
        dt_weight: torch.Tensor | None,
        b_weight: torch.Tensor | None,
        c_weight: torch.Tensor | None,
        eps: float | None,
        dt_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The finished sum as dt, B and C; see :meth:`Partial.split`."""
        sliced = partial.sliced and self.takes_slices(partial.tp)
        return split_dt_bc(
            partial.value if sliced else self.sum(partial),
            time_step_rank,
            state_size,
            dt_weight=dt_weight,
            b_weight=b_weight,
            c_weight=c_weight,
            eps=eps,
            dt_dtype=dt_dtype,
        )


@dataclass
class Traffic:
    """Collectives that were asked for, and the bytes of their results on one rank."""

    all_reduces: int = 0
    all_reduce_bytes: int = 0
    all_gathers: int = 0
    all_gather_bytes: int = 0
    reduce_scatters: int = 0
    reduce_scatter_bytes: int = 0


class CountingCommunicator(Communicator):
    """Sends nothing and counts what would be sent: results have the right shapes and no meaning."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_reduce_(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        self.traffic.all_reduces += 1
        self.traffic.all_reduce_bytes += x.nbytes
        return x

    def all_gather(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        self.traffic.all_gathers += 1
        self.traffic.all_gather_bytes += tp.size * x.nbytes
        return x.new_empty((tp.size, *x.shape))

    def reduce_scatter(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        self.traffic.reduce_scatters += 1
        self.traffic.reduce_scatter_bytes += x.nbytes // tp.size
        return x.new_empty(len(x) // tp.size, *x.shape[1:])


@contextmanager
def counted(tp: Ranks) -> Iterator[Traffic]:
    """Count the collectives over ``tp`` that the body asks for, and send none of them."""
    communicator, tp.communicator = tp.communicator, CountingCommunicator()
    try:
        yield tp.communicator.traffic
    finally:
        tp.communicator = communicator
