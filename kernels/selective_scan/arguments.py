"""The checked arguments of one call, as the op hands them to whichever implementation serves it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class SelectiveScan(NamedTuple):
    """Arguments of the op ``tp_mamba::selective_scan``, in its order; the public function explains most."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    """``[B, G, N, L]`` or ``[G, N, T]``."""
    C: torch.Tensor
    """As B, with the same number of groups."""
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool
    query_start_loc: torch.Tensor | None
    """``[S + 1]`` contiguous; None for a dense batch."""
    cache_indices: torch.Tensor | None
    """``[S]`` contiguous."""
    has_initial_state: torch.Tensor | None
    """``[S]`` contiguous."""
    ssm_states: torch.Tensor | None
    last_state: torch.Tensor | None
    """``[S, D, N]`` contiguous, written."""
    pad_slot_id: int
    out: torch.Tensor
    saved_states: torch.Tensor | None = None
    """``[B, ceil(L / k), N, D]``, packed ``[rows, N, D]``; contiguous, written."""
    save_states_every: int = 1
    """``k``: the tokens from one saved state to the next."""

    @property
    def sequences(self) -> int:
        """S, or the batch of a dense call."""
        starts = self.query_start_loc
        return self.u.shape[0] if starts is None else starts.shape[0] - 1
