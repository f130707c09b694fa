"""The checked arguments of one call, as the ops hand them to whichever implementation serves it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Convolution(NamedTuple):
    """A convolution ``x -> out`` that advances states: tensors in the order of the kernel, then what else it is told.

    Those of the op ``tp_mamba::causal_conv1d``, in its order; the public functions explain most.
    """

    out: torch.Tensor
    """``[B, D, L]``, or ``[D, T]`` with ``query_start_loc``."""
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    """``[D]`` contiguous."""
    states: torch.Tensor | None
    query_start_loc: torch.Tensor | None
    cache_indices: torch.Tensor | None
    has_initial_state: torch.Tensor | None
    silu: bool
    all_initial: bool
    """Every sequence starts from its slot; ``has_initial_state`` is then None."""
    pad_slot_id: int
    zero_null: bool = False
    """Sequences whose slot is ``pad_slot_id`` give zeros; otherwise they start from zeros."""
