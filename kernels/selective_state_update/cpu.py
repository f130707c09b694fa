"""One token of the selective scan in plain torch: in place where rows and slots agree, else gathered slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.cpu_sums import LOG2_E, MATMUL_STATES
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.selective_state_update.arguments import StateUpdate


def selective_state_update_cpu(call: StateUpdate) -> None:
    """On any device, in float32 or float64."""
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id, out = call
    dtype = wide_dtype(x.dtype)
    if state_batch_indices is None:
        _step(state[: x.shape[0]], x, dt, A, B, C, D, z, dt_bias, dt_softplus, out, dtype)
        return
    slots = state_batch_indices.tolist()
    live = [row for row, slot in enumerate(slots) if slot != pad_slot_id]
    if len(live) == 1 == len(slots):
        slot = slots[0]
        _step(state[slot : slot + 1], x, dt, A, B, C, D, z, dt_bias, dt_softplus, out, dtype)
        return
    if len(live) < len(slots):
        out.zero_()
        rows = torch.tensor(live, dtype=torch.int64, device=x.device)
        some = torch.empty_like(out[rows])
        x, dt, B, C, z = x[rows], dt[rows], B[rows], C[rows], None if z is None else z[rows]
        index = state_batch_indices[rows]
    else:
        rows, some, index = None, out, state_batch_indices
    # Gathered in the order in which the states are stored: channels are contiguous in ours, states in mamba_ssm's.
    stored = state.mT if state.stride(-1) > state.stride(-2) else state
    h = stored.index_select(0, index)
    _step(h.mT if stored is not state else h, x, dt, A, B, C, D, z, dt_bias, dt_softplus, some, dtype)
    stored.index_copy_(0, index.long(), h)
    if rows is not None:
        out.index_copy_(0, rows, some)


def _step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    out: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Advance ``state [rows, (heads,) D, N]``, one row of it a row of ``x``, in place and write ``out``."""
    # `.to` is free for a tensor that has the dtype already.
    x, dt, B, C = x.to(dtype), dt.to(dtype), _like_channels(B.to(dtype), x), _like_channels(C.to(dtype), x)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt, threshold=20.0)
    decay = torch.mul((dt * LOG2_E).unsqueeze(-1), A.to(dtype)).exp2_()
    increment = (dt * x).unsqueeze(-1)
    if state.dtype == dtype:
        h = state.mul_(decay).addcmul_(increment, B)
    else:
        h = decay.mul_(state.to(dtype)).addcmul_(increment, B)
        state.copy_(h)
    if C.shape[-2] > 1 or C.shape[-1] > MATMUL_STATES:
        y = (h * C).sum(-1)
    elif C.dim() == 3:
        y = torch.bmm(C, h.mT).squeeze(1)
    else:
        y = torch.matmul(C, h.mT).squeeze(2)
    if D is not None:
        y.addcmul_(x, D.to(dtype))
    if z is None:
        out.copy_(y)
    else:
        torch.mul(y, F.silu(z.to(dtype)), out=out)


def _like_channels(x: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """B or C, ``[rows, (G,) N]``, broadcastable with the state: ``[rows, 1 or D, N]`` or ``[rows, heads, 1, N]``."""
    if x.dim() == 2:
        x = x.unsqueeze(1)
    if x.shape[1] != 1:  # each group serves the same number of heads, or of channels where there are no heads
        x = x.repeat_interleave(channels.shape[1] // x.shape[1], dim=1)
    return x.unsqueeze(2) if channels.dim() == 3 else x
