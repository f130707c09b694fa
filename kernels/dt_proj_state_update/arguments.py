"""The checked arguments of one call, as the op hands them to whichever implementation serves it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class DtProjStateUpdate(NamedTuple):
    """Arguments of the op ``tp_mamba::dt_proj_state_update``, in its order; the public function explains them."""

    state: torch.Tensor
    x: torch.Tensor
    dt: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    """``[D]`` contiguous."""
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    state_batch_indices: torch.Tensor | None
    """``[B]`` contiguous."""
    pad_slot_id: int
    out: torch.Tensor


def tensors_of(call: DtProjStateUpdate) -> tuple[Any, ...]:
    """The tensors of a call in the order in which the kernel takes them."""
    state, x, dt, weight, bias, A, B, C, D, z, slots, _, out = call
    return state, x, dt, weight, z, out, A, B, C, D, bias, slots
