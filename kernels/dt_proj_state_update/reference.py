"""dt_proj, softplus and one token of the selective scan as the formula reads, one row at a time, in plain torch.

The oracle of the tests: pass float64 tensors for a float64 answer. It works in float32 for every narrower dtype, and
rounds twice: the time steps to the dtype of ``dt``, as the two calls that it stands for do, and ``out`` at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.dtypes import wide_dtype


def dt_proj_state_update_reference(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    state_batch_indices: torch.Tensor | None = None,
    *,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """As :func:`tp_mamba.kernels.dt_proj_state_update.dt_proj_state_update`; ``state`` is written in place."""
    wide = wide_dtype(x.dtype)
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for row in range(x.shape[0]):
        slot = row if state_batch_indices is None else int(state_batch_indices[row])
        if state_batch_indices is not None and slot == pad_slot_id:
            continue
        step = weight.to(wide) @ dt[row].to(wide)
        if bias is not None:
            step = step + bias.to(wide)
        delta = F.softplus(step, threshold=20.0).to(dt.dtype).to(wide)[:, None]
        u = x[row].to(wide)
        h = torch.exp(delta * A.to(wide)) * state[slot].to(wide) + delta * B[row].to(wide) * u[:, None]
        y = (h * C[row].to(wide)).sum(-1)
        if D is not None:
            y = y + D.to(wide) * u
        if z is not None:
            y = y * F.silu(z[row].to(wide))
        state[slot] = h.to(state.dtype)
        out[row] = y.to(out.dtype)
    return out
