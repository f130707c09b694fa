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


def selective_scan_gradients_reference(
    inputs: dict[str, torch.Tensor],
    grad_out: torch.Tensor | None,
    grad_final: torch.Tensor | None = None,
    *,
    delta_softplus: bool = False,
    query_start_loc: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Gradients of the scan by autograd through the loop above, written so that autograd sees through it.

    Args:
        inputs: the tensors of :func:`tp_mamba.kernels.selective_scan.selective_scan` by name; None for an absent one.
        grad_out, grad_final: the gradients of its output and of its final states; None for zeros.

    Returns:
        The gradient of every input that there is, in its dtype.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    u, A = leaves["u"], leaves["A"]
    dtype, packed = wide_dtype(u.dtype), query_start_loc is not None
    spans = [(b, 0, u.shape[-1]) for b in range(u.shape[0])]
    if query_start_loc is not None:
        spans = [(0, start, stop) for start, stop in pairwise(query_start_loc.tolist())]

    def of_channels(x: torch.Tensor) -> torch.Tensor:
        """B or C as ``[B, D, N, L]``, packed ``[1, D, N, T]``."""
        if not packed and x.dim() == 2:
            return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1]).to(dtype)
        x = x[None] if packed else x
        x = x[:, None] if x.dim() == 3 else x
        return x.repeat_interleave(A.shape[0] // x.shape[1], dim=1).to(dtype)

    wide = {name: x.to(dtype) for name, x in leaves.items()}
    b_all, c_all = of_channels(leaves["B"]), of_channels(leaves["C"])
    x_all, dt_all = (wide[name][None] if packed else wide[name] for name in ("u", "delta"))
    if "delta_bias" in wide:
        dt_all = dt_all + wide["delta_bias"][:, None]
    if delta_softplus:
        dt_all = F.softplus(dt_all, threshold=20.0)
    loss = u.new_zeros((), dtype=dtype)
    for s, (row, start, stop) in enumerate(spans):
        h = wide["initial_states"][s] if "initial_states" in wide else torch.zeros_like(A, dtype=dtype)
        for t in range(start, stop):
            dt, x = dt_all[row, :, t, None], x_all[row, :, t, None]
            h = torch.exp(dt * wide["A"]) * h + dt * b_all[row, :, :, t] * x
            y = (h * c_all[row, :, :, t]).sum(-1)
            if "D" in wide:
                y = y + wide["D"] * x[:, 0]
            if "z" in wide:
                y = y * F.silu(wide["z"][..., t] if packed else wide["z"][row, :, t])
            if grad_out is not None:
                loss = loss + (y * (grad_out[..., t] if packed else grad_out[row, :, t]).to(dtype)).sum()
        if grad_final is not None:
            loss = loss + (h * grad_final[s].to(dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }
