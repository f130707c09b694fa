"""How many slots an engine has: for sequences that run, and for states that are kept for prompts to come."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from tp_mamba.engine.memory import ClampedWarning, Limits, Needs, agree_on_limits
from tp_mamba.engine.model import Model

MAX_BATCH_SIZE = 256
"""Sequences at a time, unless another number is asked for; fewer where memory is short."""

MAX_SNAPSHOTS = 64
"""States kept for prompts to come, with prefix caching; fewer where memory is short."""


@dataclass(frozen=True, slots=True)
class Room:
    """What every rank of an engine has agreed on."""

    sequences: int
    """Slots of sequences that run."""
    snapshots: int
    """Slots of states that are kept; 0 without prefix caching."""
    max_prefill_tokens: int

    @property
    def slots(self) -> int:
        """All of them."""
        return self.sequences + self.snapshots


def agree_on_room(
    model: Model,
    *,
    asked: int | None,
    at_most: int | None,
    max_prefill_tokens: int,
    fraction: float,
    captures: bool,
    keeps_states: bool,
) -> Room:
    """The room for ``asked`` sequences, :data:`MAX_BATCH_SIZE` where nobody asked; every rank calls this.

    Snapshots take what the sequences leave of the memory, or a quarter. Where less than asked for fits, rank 0 warns.

    Args:
        at_most: as many sequences as will ever run at a time; None where that is not known.
        captures: whether steps are captured.
        keeps_states: whether there are to be snapshots.
    """
    needs = Needs.of(model, captures=captures)

    def room_for(sequences: int) -> Limits:
        return agree_on_limits(
            model.tp,
            needs,
            device=model.device,
            max_batch_size=sequences,
            max_prefill_tokens=max_prefill_tokens,
            fraction=fraction,
        )

    limits = room_for(min(asked or at_most or MAX_BATCH_SIZE, at_most or asked or MAX_BATCH_SIZE))
    lowered = asked is not None or limits.max_prefill_tokens < max_prefill_tokens
    if limits.note is not None and lowered and model.tp.rank == 0:
        warnings.warn(limits.note, ClampedWarning, stacklevel=4)
    running, max_prefill_tokens = limits.max_batch_size, limits.max_prefill_tokens
    if not keeps_states:
        return Room(running, 0, max_prefill_tokens)
    fits = room_for(running + MAX_SNAPSHOTS).max_batch_size
    running = min(running, max(1, fits - fits // 4))
    return Room(running, max(1, fits - running), max_prefill_tokens)
