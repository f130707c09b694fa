"""One token of the selective scan as its formula reads: one row, one head, one group at a time, in plain torch.

The oracle of the tests: pass float64 tensors for a float64 answer. It works in float32 for every narrower
dtype and rounds once, when it writes ``out`` and the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.dtypes import wide_dtype


def selective_state_update_reference(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    *,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """As :func:`tp_mamba.kernels.selective_state_update.selective_state_update`; ``state`` is written in place."""
    dtype = wide_dtype(x.dtype)
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    groups = B.shape[1] if B.dim() == 3 else 1
    group_size = x[0].numel() // groups

    for row in range(x.shape[0]):
        slot = row if state_batch_indices is None else int(state_batch_indices[row])
        if state_batch_indices is not None and slot == pad_slot_id:
            continue
        for channel in range(x[0].numel()):
            at = (channel,) if x.dim() == 2 else divmod(channel, x.shape[2])
            group = channel // group_size
            b = (B[row] if B.dim() == 2 else B[row, group]).to(dtype)
            c = (C[row] if C.dim() == 2 else C[row, group]).to(dtype)
            u, step = x[(row, *at)].to(dtype), dt[(row, *at)].to(dtype)
            if dt_bias is not None:
                step = step + dt_bias[at].to(dtype)
            if dt_softplus:
                step = F.softplus(step, threshold=20.0)
            h = torch.exp(step * A[at].to(dtype)) * state[(slot, *at)].to(dtype) + step * b * u
            y = (h * c).sum()
            if D is not None:
                y = y + D[at].to(dtype) * u
            if z is not None:
                y = y * F.silu(z[(row, *at)].to(dtype))
            state[(slot, *at)] = h.to(state.dtype)
            out[(row, *at)] = y.to(out.dtype)
    return out
