"""Sums over the GPUs of one host by kernels of ours, each in one kernel with what comes next.

The default where NCCL serves CUDA in a group; ``TP_MAMBA_FUSED_ALL_REDUCE=0``, or
``TensorParallel(group, communicator=Communicator())``, leaves all sums to NCCL.

When a group sums for the first time, all its ranks, who are all there then, share memory
(:mod:`tp_mamba.parallel.symmetric`) and try a few sums. If that fails for any of them (several hosts, GPUs without a
link, memory) they all go on with NCCL, and a warning says why, once. A graph must not be captured before that:
:meth:`FusedCommunicator.prepare`.

Large sums, those of a prompt, are sent while the products before and after are computed:
:mod:`tp_mamba.parallel.large`.

Streams: the sums of a group are in one order, the same on every rank. A sum on another stream than the one before is
made to wait for what was put on that. A captured graph keeps the order within it; replays, and sums beside them, are to
be ordered as the same rank orders other work, by replaying on the stream that the sums run on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from tp_mamba.kernels.all_reduce import (
    SUMMED,
    Exchange,
    all_reduce,
    all_reduce_,
    all_reduce_add_rms_norm,
    all_reduce_split_dt_bc,
)
from tp_mamba.kernels.all_reduce.shares import Shares
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.parallel import symmetric
from tp_mamba.parallel.collectives import Ranks
from tp_mamba.parallel.communicate import Communicator, whole_residual
from tp_mamba.parallel.large import LEAST_BYTES, LargeSums
from tp_mamba.parallel.partial import Partial, Scattered
from tp_mamba.parallel.self_test import failure

VARIABLE = "TP_MAMBA_FUSED_ALL_REDUCE"


def is_wanted() -> bool:
    """Whether the environment leaves fused sums on, as it does by default.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"{VARIABLE} is {value!r}: set it to 1 for fused sums (the default), or to 0 for NCCL's"
        )
    return value == "1"


class _Order:
    """Which stream the last sum of a group was put on, so that the next one is behind it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def enter(self) -> None:
        """Make the current stream wait for the last one, where that is another.

        Raises:
            RuntimeError: the last one is being captured into a graph, which this sum is not part of.
        """
        stream, last = torch.cuda.current_stream(self._device), self._last
        if last is not None and last.cuda_stream != stream.cuda_stream:
            here = torch.cuda.is_current_stream_capturing()
            with torch.cuda.stream(last):
                there = torch.cuda.is_current_stream_capturing()
            if there and not here:
                raise RuntimeError(
                    "a sum over the ranks beside a graph that is being captured with sums of the same group: let the "
                    "capture end first, or make the stream wait for the one that captures"
                )
            if here == there:
                # What ran before a capture is not part of it: the replay's own stream orders the two.
                stream.wait_stream(last)
        self._last = stream


class FusedCommunicator(Communicator):
    """Finishes sums over the ranks by kernels that store each term straight into the other ranks' memory.

    One object is one group's. What the kernels do not take (float64, integers, a CPU) goes the plain way.
    """

    def __init__(self) -> None:
        self._exchange: Exchange | None = None
        self._large: LargeSums | None = None
        self._order: _Order | None = None
        self._device: torch.device | None = None
        self._group: dist.ProcessGroup | None = None
        self._fused = True

    def __reduce__(self) -> tuple[Callable[[], FusedCommunicator], tuple[()]]:
        """Pickled without its memory, which is of one run of one program."""
        return FusedCommunicator, ()

    def prepare(self, tp: Ranks) -> bool:
        """Share memory, and try it; every rank calls this together, or all sum for the first time together.

        Returns:
            Whether sums are fused from here on. If not, a warning has told why.

        Raises:
            RuntimeError: a graph is being captured.
            ValueError: this object serves another group already.
        """
        if tp.size == 1:
            return False
        if self._group is not None:
            if tp.process_group() is not self._group:
                raise ValueError(
                    "one FusedCommunicator was given to two process groups: make one for each, or leave it out"
                )
            return self._fused
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a graph is being captured and the ranks have not shared their memory yet: run the step once before, "
                "or call tp.communicator.prepare(tp)"
            )
        group, device = tp.process_group(), torch.device("cuda", torch.cuda.current_device())
        memory, reason = _opened(group, device)
        if reason is not None:
            warnings.warn(
                f"sums over the ranks are left to NCCL, which is slower for small ones: {reason}",
                stacklevel=2,
            )
        self._fused = memory is not None
        if memory is not None:
            self._exchange, self._large = memory[0], LargeSums(memory[1])
        self._device, self._order, self._group = device, _Order(device), group
        return self._fused

    def _serving(self, x: torch.Tensor, tp: Ranks) -> Exchange | None:
        """What ``x`` can be summed through; None where the plain way serves it. Ordered behind the sum before."""
        if not x.is_cuda or x.dtype not in SUMMED or tp.size == 1:
            return None
        if self._group is None or self._group is not tp.process_group():
            self.prepare(tp)
        if not self._fused or x.device != self._device:
            return None
        assert self._order is not None
        self._order.enter()
        return self._exchange

    def all_reduce_(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        exchange = self._serving(x, tp)
        if exchange is None:
            return super().all_reduce_(x, tp)
        with torch.no_grad():
            return all_reduce_(x, exchange)

    def takes_slices(self, tp: Ranks) -> bool:
        """Always: slices are added up by the kernel that sends the sum."""
        return self._fused or super().takes_slices(tp)

    def begin(
        self,
        product: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        columns: int,
        tp: Ranks,
        bias: torch.Tensor | None,
    ) -> Partial:
        plain = torch.is_grad_enabled() or x.dim() != 2 or (bias is not None and bias.dtype != x.dtype)
        large = None if plain else self._large_for(x, len(x), columns, tp)
        if large is None:
            return super().begin(product, x, columns, tp, bias)
        return large.begin(product, x, tp, bias)

    def _large_for(self, x: torch.Tensor, rows: int, columns: int, tp: Ranks) -> LargeSums | None:
        """What sums ``[rows, columns]`` in the dtype of ``x`` by shares, where that is a large sum; ordered."""
        if rows * columns * x.dtype.itemsize < LEAST_BYTES or self._serving(x, tp) is None:
            return None
        large = self._large
        return large if large is not None and large.takes(rows, columns, x.dtype) else None

    def _large_of(self, partial: Partial) -> LargeSums:
        """What ends a sum that has begun; ordered."""
        assert partial.begun is not None
        assert self._large is not None
        assert self._order is not None
        self._order.enter()
        return self._large

    def sum(self, partial: Partial) -> torch.Tensor:
        if partial.begun is not None:
            return self._large_of(partial).sum(partial)
        if _is_tracked(partial.value, partial.bias):
            return super().sum(partial)
        x = partial.added_slices()
        exchange = self._serving(x, partial.tp)
        dtype = x.dtype if partial.dtype is None else partial.dtype
        if exchange is None or dtype not in SUMMED:
            return super().sum(partial)
        y = (
            all_reduce_(x, exchange)
            if dtype == x.dtype and x.is_contiguous()
            else all_reduce(x, exchange, out_dtype=dtype)
        )
        return y if partial.bias is None else y + partial.bias.to(y.dtype)

    def add_and_norm(
        self,
        partial: Partial,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        *,
        residual_in_fp32: bool,
    ) -> tuple[torch.Tensor | Scattered, torch.Tensor]:
        x, bias = partial.value, partial.bias
        same = partial.dtype in (None, x.dtype) and (bias is None or bias.dtype == x.dtype)
        may_begin = partial.begun is None and partial.by_rows and not torch.is_grad_enabled()
        if may_begin and same and x.dim() == 2:
            large = self._large_for(x, len(x), x.shape[1], partial.tp)
            partial = partial if large is None else large.begun(partial)
        if partial.begun is not None:
            if partial.by_rows:
                residual_dtype = torch.float32 if residual_in_fp32 else x.dtype
                return self._large_of(partial).add_and_norm(
                    partial, residual, weight, eps, residual_dtype=residual_dtype
                )
            total = self.sum(partial)
            residual = whole_residual(residual, total, partial.tp)
            return add_rms_norm(total, residual, weight, eps, residual_in_fp32=residual_in_fp32)
        residual = whole_residual(residual, x, partial.tp)
        plain = partial.sliced or not same or _is_tracked(x, bias, residual, weight)
        exchange = None if plain else self._serving(x, partial.tp)
        if exchange is None:
            return super().add_and_norm(partial, residual, weight, eps, residual_in_fp32=residual_in_fp32)
        return all_reduce_add_rms_norm(
            x, residual, weight, eps, exchange, bias=bias, residual_in_fp32=residual_in_fp32
        )

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
        x = partial.value
        plain = partial.bias is not None or partial.dtype not in (None, x.dtype)
        plain = plain or _is_tracked(x, dt_weight, b_weight, c_weight)
        exchange = None if plain or x.dtype != torch.float32 else self._serving(x, partial.tp)
        weights = {"dt_weight": dt_weight, "b_weight": b_weight, "c_weight": c_weight}
        if exchange is None:
            if partial.sliced and partial.tp.size > 1:
                partial = Partial(partial.added_slices(), partial.tp, partial.bias, partial.dtype)
            return super().split(partial, time_step_rank, state_size, **weights, eps=eps, dt_dtype=dt_dtype)
        return all_reduce_split_dt_bc(
            x, time_step_rank, state_size, exchange, **weights, eps=eps, dt_dtype=dt_dtype
        )


def _is_tracked(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient is to come back through one of them: the fused sums have none."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _opened(
    group: dist.ProcessGroup, device: torch.device
) -> tuple[tuple[Exchange, Shares] | None, str | None]:
    """Memory that all ranks share and that sums have come through, or why there is none: the same on every rank."""
    ranks = _gather(symmetric.see(device), group)
    reason = symmetric.reason_against(ranks)
    if reason is not None:
        return None, reason
    memory, found = None, None
    try:
        memory = symmetric.open_memory(group, device, min(seen.sm_count for seen in ranks))
    except symmetric.UnreachableError as error:
        found = str(error)
    reason = _first(_gather(found, group))
    if reason is not None or memory is None:
        return None, reason
    reason = _first(_gather(failure(*memory, group), group))
    return (memory, None) if reason is None else (None, reason)


def _gather(value: object, group: dist.ProcessGroup) -> list:
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _first(reasons: list[str | None]) -> str | None:
    return next((f"rank {rank}: {found}" for rank, found in enumerate(reasons) if found is not None), None)
