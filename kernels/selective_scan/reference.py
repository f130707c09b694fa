"""The selective scan as its formula reads: one sequence, one token at a time, in plain torch.

The oracle of the tests: pass float64 tensors for a float64 answer. It works in float32 for every narrower
dtype, as the fast implementations do, and rounds once, when it writes ``out``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.dtypes import wide_dtype


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    ssm_states: torch.Tensor | None = None,
    pad_slot_id: int = -1,
    save_states_every: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Arguments as :func:`tp_mamba.kernels.selective_scan.selective_scan_fn`; ``ssm_states`` is written in place.

    Returns:
        ``(out, last_state)``: ``out`` in the shape and dtype of ``u``, ``last_state [S, D, N]`` in float32
        (float64 for float64 ``u``). Tokens outside ``query_start_loc`` are zero in ``out``. With ``save_states_every``
        also ``saved_states``, in which rows that no sequence has are zero.
    """
    dtype = wide_dtype(u.dtype)
    n = A.shape[1]

    def channels_by_state(x: torch.Tensor) -> torch.Tensor:
        """B or C, in any accepted form, as ``[B, D, N, L]`` (packed: ``[1, D, N, T]``)."""
        if query_start_loc is None and x.dim() == 2:
            return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1])
        if query_start_loc is not None:
            x = x[None]
        if x.dim() == 3:
            x = x[:, None]
        return x.repeat_interleave(A.shape[0] // x.shape[1], dim=1)

    if query_start_loc is None:
        spans = [(b, 0, u.shape[-1]) for b in range(u.shape[0])]
    else:
        offsets = query_start_loc.tolist()
        spans = [(0, start, stop) for start, stop in pairwise(offsets)]
    b_all, c_all = channels_by_state(B).to(dtype), channels_by_state(C).to(dtype)

    def dense(x: torch.Tensor) -> torch.Tensor:
        return (x if query_start_loc is None else x[None]).to(dtype)

    u_all, delta_all = dense(u), dense(delta)
    if delta_bias is not None:
        delta_all = delta_all + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta_all = F.softplus(delta_all, threshold=20.0)
    y_all = torch.zeros_like(u_all)
    last_state = torch.zeros(len(spans), *A.shape[:1], n, dtype=dtype, device=u.device)
    k, length = save_states_every, u.shape[-1]
    saved_states = None
    if k is not None:
        rows = (length // k + len(spans),) if query_start_loc is not None else (len(spans), -(-length // k))
        saved_states = torch.zeros(*rows, *A.shape, dtype=dtype, device=u.device)

    for s, (row, start, stop) in enumerate(spans):
        slot = s if cache_indices is None else int(cache_indices[s])
        keeps = ssm_states is not None and (cache_indices is None or slot != pad_slot_id)
        h = last_state[s]
        if ssm_states is not None and keeps and has_initial_state is not None and bool(has_initial_state[s]):
            h = ssm_states[slot].to(dtype)
        for t in range(start, stop):
            if k is not None and saved_states is not None and (t - start) % k == 0:
                j = (t - start) // k
                saved_states[start // k + s + j if query_start_loc is not None else (s, j)] = h
            dt = delta_all[row, :, t, None]
            h = torch.exp(dt * A.to(dtype)) * h + dt * b_all[row, :, :, t] * u_all[row, :, t, None]
            y_all[row, :, t] = (h * c_all[row, :, :, t]).sum(-1)
        last_state[s] = h
        if ssm_states is not None and keeps:
            ssm_states[slot] = h.to(ssm_states.dtype)

    if D is not None:
        y_all = y_all + D.to(dtype)[:, None] * u_all
    if z is not None:
        y_all = y_all * F.silu(dense(z))
    out = (y_all if query_start_loc is None else y_all[0]).to(u.dtype)
    return (out, last_state) if saved_states is None else (out, last_state, saved_states)
