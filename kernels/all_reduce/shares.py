"""Large sums over the GPUs of one host, by shares of their rows, with residual add and RMSNorm.

Of ``T`` rows rank r adds up a share, ``ceil(T / n)`` of them, r's of as many::

    send_terms, to each other rank      its rows of this rank's term, by a copy engine
    tell_terms_sent, wait_for_terms     the others' terms of this rank's rows are here
    add_shares                          sum, bias, residual, norm of these rows
    send_rows, to each other rank       by a copy engine
    tell_rows_sent, wait_for_rows       the others' rows are here

A copy engine takes no SM from a product that is computed meanwhile, which is what the cut is for: terms are sent while
the rest of the product that gives them is computed, rows while the next product takes those that are here. The residual
stream is kept by the rank that adds to it, so each of its rows is read and written once and not on every rank.

Nobody reads where a rank writes. Terms of sum m + 1 come to a rank once it has told that its rows of sum m are sent,
which is behind its reading of the terms of sum m. Rows of sum m + 1 come once it has told that its terms of sum m + 1
are sent, and on its streams that is behind whatever read the rows of sum m. So one sum at a time is between its first
``send_terms`` and its ``wait_for_rows``, and what reads its rows is ahead of the next sum's ``send_terms``.

Bits: those of ``all_reduce_add_rms_norm``, terms added in rank order in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tp_mamba.kernels.all_reduce import Exchange
from tp_mamba.kernels.common.integers import cdiv


@dataclass(frozen=True, eq=False)
class Shares:
    """What one rank holds of the memory that its group's large sums pass through; one sum at a time."""

    terms: tuple[torch.Tensor, ...]
    """By rank, ``[bytes]`` uint8: where terms of that rank's rows arrive; this rank's own memory among them."""
    rows: tuple[torch.Tensor, ...]
    """The same, of finished rows of all ranks."""
    terms_sent: Exchange
    """Of one program: through it a rank tells that terms are sent."""
    rows_sent: Exchange
    """The same of rows."""

    @property
    def rank(self) -> int:
        return self.terms_sent.rank

    @property
    def size(self) -> int:
        return len(self.terms)

    def takes(self, T: int, H: int, dtype: torch.dtype) -> bool:
        """Whether a sum of ``[T, H]`` fits."""
        row = H * dtype.itemsize
        arriving = (self.size - 1) * cdiv(T, self.size) * row
        return arriving <= self.terms[0].numel() and T * row <= self.rows[0].numel()

    def rows_of(self, rank: int, T: int) -> slice:
        """Which of ``T`` rows ``rank`` adds up."""
        share = cdiv(T, self.size)
        return slice(min(T, rank * share), min(T, (rank + 1) * share))

    def terms_at(self, rank: int, T: int, H: int, dtype: torch.dtype) -> torch.Tensor:
        """``[n - 1, ceil(T / n), H]`` at ``rank``: where the others' terms of its rows arrive, in rank order."""
        share = cdiv(T, self.size)
        needed = (self.size - 1) * share * H * dtype.itemsize
        return self.terms[rank][:needed].view(dtype).view(self.size - 1, share, H)

    def rows_at(self, rank: int, T: int, H: int, dtype: torch.dtype) -> torch.Tensor:
        """``[T, H]``: where finished rows arrive at ``rank``."""
        return self.rows[rank][: T * H * dtype.itemsize].view(dtype).view(T, H)


def send_terms(term: torch.Tensor, rank: int, T: int, shares: Shares) -> None:
    """Copy ``term``, this rank's term of ``rank``'s of ``T`` rows, to where that rank adds them up.

    On the current stream, by the copy engines. Before the first copy of a sum the stream must be behind whatever reads
    the rows of the sum before.
    """
    slot = shares.rank if shares.rank < rank else shares.rank - 1
    shares.terms_at(rank, T, term.shape[1], term.dtype)[slot, : len(term)].copy_(term)


def tell_terms_sent(shares: Shares) -> None:
    """Tell the other ranks that this rank's terms are with them: behind the copies, on their stream."""
    _words(shares.terms_sent, take=False)


def wait_for_terms(shares: Shares) -> None:
    """Wait, on the current stream, until the other ranks' terms are here."""
    _words(shares.terms_sent, take=True)


def add_shares(
    own: torch.Tensor, T: int, shares: Shares, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum (+ ``bias``) of this rank's rows, in its place among all ``T``.

    Args:
        own: this rank's term of its own rows, contiguous; those of the others have been waited for.

    Returns:
        ``[T, H]`` in the group's memory: whole once the rows have been sent and waited for, until the next sum.
    """
    return _add(None, own, None, None, bias, 0.0, T, shares)


def add_shares_rms_norm(
    own: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    T: int,
    shares: Shares,
    *,
    bias: torch.Tensor | None = None,
    residual_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`add_shares`, and on to the norm of sum and residual.

    Args:
        residual: this rank's rows of it, any strides, or None.

    Returns:
        ``(normed, new_residual)``: ``[T, H]`` as there; and this rank's rows, ``[ceil(T / n), H]``, zeros behind the
        last one.
    """
    new_residual = own.new_empty(cdiv(T, shares.size), own.shape[1], dtype=residual_dtype)
    return _add(new_residual, own, residual, weight, bias, eps, T, shares), new_residual


def send_rows(rows: torch.Tensor, rank: int, shares: Shares) -> None:
    """Copy this rank's rows of ``rows``, from :func:`add_shares`, to ``rank``: on the current stream."""
    T, H = rows.shape
    mine = shares.rows_of(shares.rank, T)
    shares.rows_at(rank, T, H, rows.dtype)[mine].copy_(rows[mine])


def tell_rows_sent(shares: Shares) -> None:
    """Tell the other ranks that this rank's rows are with them: behind the copies, on their stream."""
    _words(shares.rows_sent, take=False)


def wait_for_rows(shares: Shares) -> None:
    """Wait, on the current stream, until the other ranks' rows are here."""
    _words(shares.rows_sent, take=True)


def _words(exchange: Exchange, *, take: bool) -> None:
    from tp_mamba.kernels.all_reduce.rows import launch_words

    launch_words(exchange.rounds, exchange.peers, exchange.rank, take)


def _add(
    new_residual: torch.Tensor | None,
    own: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    T: int,
    shares: Shares,
) -> torch.Tensor:
    from tp_mamba.kernels.all_reduce.rows import launch

    H, rank = own.shape[1], shares.rank
    terms, rows = (at(rank, T, H, own.dtype) for at in (shares.terms_at, shares.rows_at))
    out = rows[shares.rows_of(rank, T)]
    launch(out, new_residual, own, terms, residual, weight, bias, eps, rank)
    return rows
