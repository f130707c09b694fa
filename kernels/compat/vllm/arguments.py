"""What vLLM's functions have in common beside tensors: the number that means no slot, and prefix caching."""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.checks import PREFIX_CACHING
from tp_mamba.kernels.compat.keywords import Unused

NULL_BLOCK_ID = 0

BLOCKS: Unused = dict.fromkeys(
    (
        "block_idx_first_scheduled_token",
        "block_idx_last_scheduled_token",
        "initial_state_idx",
        "num_computed_tokens",
    ),
    (None, PREFIX_CACHING),
)
"""States kept at the boundaries of blocks, which are not supported."""


def no_slot(op: str, null_block_id: int | None, pad_slot_id: int | None) -> int:
    """The slot number that means no slot; raise ValueError for two different ones."""
    if null_block_id is not None and pad_slot_id is not None and null_block_id != pad_slot_id:
        raise ValueError(
            f"{op}: null_block_id is {null_block_id} and pad_slot_id {pad_slot_id}, two names of the slot number that "
            "means no slot: give one"
        )
    if null_block_id is not None:
        return null_block_id
    return NULL_BLOCK_ID if pad_slot_id is None else pad_slot_id


def first_slots(slots: torch.Tensor | None, sequences: int) -> torch.Tensor | None:
    """A slot list, or table, without the rows after those of the sequences."""
    return slots if slots is None or slots.dim() == 0 else slots[:sequences]
