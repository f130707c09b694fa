"""The checked arguments of one call, as the op hands them to whichever implementation serves it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class StateUpdate(NamedTuple):
    """Arguments of the op ``tp_mamba::selective_state_update``, in its order; the public function explains them."""

    state: torch.Tensor
    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None
    dt_softplus: bool
    state_batch_indices: torch.Tensor | None
    """``[B]`` contiguous."""
    pad_slot_id: int
    out: torch.Tensor


def tensors_of(call: StateUpdate) -> tuple[Any, ...]:
    """The tensors of a call in the order in which both kernels take them."""
    state, x, dt, A, B, C, D, z, dt_bias, _, slots, _, out = call
    return state, x, dt, z, out, A, B, C, D, dt_bias, slots
