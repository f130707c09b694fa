"""Large sums over the GPUs of one host: by shares of rows, sent behind the products before and after.

A row-parallel product is computed a share of its rows at a time, the other ranks' shares first. Each is on its way, by
a copy engine and on a stream of its own, while the next is multiplied; when this rank's own share is there, so are the
other ranks' terms of it. Their sum, the residual and the norm are one kernel, of this rank's rows. The normed rows are
on their way while the column-parallel product behind the norm takes this rank's; then it takes the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from tp_mamba.kernels.all_reduce.shares import (
    Shares,
    add_shares,
    add_shares_rms_norm,
    send_rows,
    send_terms,
    tell_rows_sent,
    tell_terms_sent,
    wait_for_rows,
    wait_for_terms,
)
from tp_mamba.parallel.collectives import Ranks
from tp_mamba.parallel.partial import Lent, Partial

LEAST_BYTES = 8 << 20
"""Messages from this size on are summed by shares; below it, one kernel that sends whole terms is as fast."""


class LargeSums:
    """The large sums of one group, one at a time.

    A Partial that has begun and is dropped leaves those that follow to the way of the small ones.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        device = shares.terms_sent.rounds.device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._side is not None:
            # Kept: on a slow host, to make one takes longer than to record it.
            self._forked, self._joined = torch.cuda.Event(), torch.cuda.Event()
        self._sent: list[torch.Tensor] | None = None
        """Terms that the copy engines read, between the beginning of a sum and its end; None between two sums."""
        self._rows_due = False
        """Whether rows are on their way that were not waited for."""
        self._captured = False
        """Whether the sum that began last was captured instead of run."""

    def takes(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        """Whether a sum of ``[rows, columns]`` that is to begin is one of these; the same on every rank."""
        if self._captured and not self._is_capturing():
            # The capture has ended: if it failed in the midst of a sum, nothing of that was ever sent.
            self._sent, self._rows_due = None, False
        large = rows * columns * dtype.itemsize >= LEAST_BYTES
        return large and self._sent is None and self._shares.takes(rows, columns, dtype)

    def begin(
        self,
        product: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        tp: Ranks,
        bias: torch.Tensor | None,
    ) -> Partial:
        """A Partial of ``product(x)`` that has begun.

        Args:
            product: rows ``[.., k]`` to as many rows ``[.., H]``.
            x: ``[T, k]``; :meth:`takes` has said yes.
        """
        self._wait_for_rows()
        T, self._sent, self._captured = len(x), [], self._is_capturing()
        others = self._others(tp)
        for rank in others:
            term = product(x[self._shares.rows_of(rank, T)])
            self._sent.append(term)
            with self._beside():
                send_terms(term, rank, T, self._shares)
                if rank == others[-1]:
                    tell_terms_sent(self._shares)
        return Partial(product(x[self._shares.rows_of(tp.rank, T)]), tp, bias, begun=T)

    def begun(self, partial: Partial) -> Partial:
        """A Partial whose value is whole, ``[T, H]``, as one that has begun."""
        self._wait_for_rows()
        value, tp = partial.value.contiguous(), partial.tp
        T, self._sent, self._captured = len(value), [value], self._is_capturing()
        with self._beside():
            for rank in self._others(tp):
                send_terms(value[self._shares.rows_of(rank, T)], rank, T, self._shares)
            tell_terms_sent(self._shares)
        return replace(partial, value=value[self._shares.rows_of(tp.rank, T)], begun=T)

    def sum(self, partial: Partial) -> torch.Tensor:
        """The finished sum ``[T, H]``, bias added, of a Partial that has begun."""
        T = self._arrived(partial)
        total = add_shares(partial.value, T, self._shares, bias=partial.bias)
        self._send_rows(total, partial.tp)
        self._wait_for_rows()
        return total.clone()

    def add_and_norm(
        self,
        partial: Partial,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        *,
        residual_dtype: torch.dtype,
    ) -> tuple[Lent, torch.Tensor]:
        """``(norm(sum + residual), sum + residual)`` of a Partial that has begun, the second for this rank's rows.

        Args:
            residual: whole; or this rank's rows of it, as this method gave it.
        """
        T, tp = self._arrived(partial), partial.tp
        if residual is not None:
            mine = self._shares.rows_of(tp.rank, T)
            residual = residual[mine] if len(residual) == T else residual[: mine.stop - mine.start]
        normed, new_residual = add_shares_rms_norm(
            partial.value, residual, weight, eps, T, self._shares,
            bias=partial.bias, residual_dtype=residual_dtype,
        )  # fmt: skip
        self._send_rows(normed, tp)
        return Lent(normed, tp, T, self._shares.rows_of(tp.rank, T), self._wait_for_rows), new_residual

    def _is_capturing(self) -> bool:
        return self._side is not None and torch.cuda.is_current_stream_capturing()

    def _others(self, tp: Ranks) -> list[int]:
        """The other ranks; no two ranks begin with the same one."""
        return [(tp.rank + step) % tp.size for step in range(1, tp.size)]

    def _beside(self) -> AbstractContextManager[object]:
        """A context on the stream of the copies, behind what is on the current one: in its graph, if it is captured."""
        if self._side is None:
            return nullcontext()
        self._forked.record(torch.cuda.current_stream(self._side.device))
        self._side.wait_event(self._forked)
        return torch.cuda.stream(self._side)

    def _join(self) -> None:
        """Have the current stream behind the copies; they are of the same graph, if it is captured."""
        if self._side is not None:
            self._joined.record(self._side)
            torch.cuda.current_stream(self._side.device).wait_event(self._joined)

    def _arrived(self, partial: Partial) -> int:
        """Wait until the terms of a Partial that has begun are here; its rows."""
        assert partial.begun is not None
        self._join()
        wait_for_terms(self._shares)
        return partial.begun

    def _send_rows(self, rows: torch.Tensor, tp: Ranks) -> None:
        with self._beside():
            for rank in self._others(tp):
                send_rows(rows, rank, self._shares)
            tell_rows_sent(self._shares)
        self._sent, self._rows_due = None, True

    def _wait_for_rows(self) -> None:
        if self._rows_due:
            self._join()
            wait_for_rows(self._shares)
            self._rows_due = False
