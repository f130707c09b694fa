"""For every layout, and for a CPU: the product with its softplus, then the state update, each by its own operator."""

from __future__ import annotations

import torch

import tp_mamba.kernels.linear_softplus
import tp_mamba.kernels.selective_state_update  # noqa: F401 - both register the ops that are called here
from tp_mamba.kernels.dt_proj_state_update.arguments import DtProjStateUpdate


def in_two_steps(call: DtProjStateUpdate) -> None:
    """Write ``call.out`` and ``call.state``."""
    state, x, dt, weight, bias, A, B, C, D, z, slots, pad_slot_id, out = call
    delta = torch.ops.tp_mamba.linear_softplus(dt, weight, bias)
    torch.ops.tp_mamba.selective_state_update(
        state, x, delta, A, B, C, D, z, None, False, slots, pad_slot_id, out
    )
