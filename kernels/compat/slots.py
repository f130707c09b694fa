"""Rows of a state buffer read and written by slot, without waiting for the device."""

from __future__ import annotations

import torch


def read_slots(states: torch.Tensor, slots: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A copy ``[S, ...]`` of the rows ``slots [S]`` of ``states``; zeros where ``real [S]`` (bool) is False."""
    if states.shape[0] == 0:  # then no slot is real
        return states.new_zeros(slots.shape[0], *states.shape[1:])
    rows = states[torch.where(real, slots, 0).long()]
    return rows.masked_fill_(~_like(real, rows), 0)


def write_slots(states: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, real: torch.Tensor) -> None:
    """``states[slots[s]] = rows[s]`` for every ``s`` with ``real[s]``; all other rows of ``states`` keep their bits.

    Which rows are real is known on the device alone. So all S rows are written: one that is not real repeats the first
    real one, to the same place, and if none is real, row 0 of ``states`` is written over itself. Duplicates write
    equal values, so their order does not matter. The slots of real rows are distinct and in range.
    """
    if rows.shape[0] == 0 or states.shape[0] == 0:
        return
    first = real.int().argmax()
    source = torch.where(real, torch.arange(rows.shape[0], device=rows.device), first)
    target = torch.where(real.any(), slots[source], 0).long()
    new = torch.where(_like(real.any(), rows), rows[source].to(states.dtype), states[target])
    states.index_put_((target,), new)


def _like(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``mask [S]`` or ``[]`` in as many dimensions as ``rows``, to broadcast over a row."""
    return mask.reshape(-1, *[1] * (rows.dim() - 1))
