"""Selective scan, the recurrence of Mamba-1, over dense or packed sequences.

For every channel d (of group g) and token t, in float32::

    dt = softplus(delta + delta_bias)                       # softplus(x) = x above 20
    h[n] = exp(dt * A[d, n]) * h[n] + dt * B[g, n, t] * u   # n = 0..N-1, h = 0 or the given state at first
    y = sum_n h[n] * C[g, n, t] + D[d] * u
    out = y * silu(z)                                       # rounded here, once

The op is ``tp_mamba::selective_scan``; it writes ``out`` and the states in place. CUDA tensors run a Triton kernel
(``mixer.py`` for the layout of a mixer, ``any.py`` for all others), the others (and float64) plain torch (``cpu.py``).
``reference.py`` holds the loop that all are tested with. :func:`selective_scan` has gradients (``differentiable.py``);
it runs the same forward, and so does :func:`selective_scan_fn` where an input requires grad.

A token's bits depend on its own sequence alone, not on the rest of the batch; in the kernels (given a float32 state)
not on where a prompt was cut either. Plain torch keeps to the latter as far as torch's own operators do: it sums states
by a batched product with one small matrix per token, of which a cut changes the number.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.checks import (
    PAD_SLOT_NAME,
    PREFIX_CACHING,
    check_shape,
    not_supported,
    slot_column,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import calls_directly
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.common.remember import key_of
from tp_mamba.kernels.selective_scan.checks import (
    check_scan,
    in_equal_groups,
    saved_rows,
    wants_gradient,
)
from tp_mamba.kernels.selective_scan.differentiable import selective_scan
from tp_mamba.kernels.selective_scan.operator import selective_scan_in_place

__all__ = ["selective_scan", "selective_scan_fn"]

_OP = "selective_scan_fn"


@not_supported(
    _OP,
    cu_seqlens="pass [0, .., T] as query_start_loc, with u [D, T]",
    null_block_id=PAD_SLOT_NAME,
    block_idx_first_scheduled_token=PREFIX_CACHING,
    block_idx_last_scheduled_token=PREFIX_CACHING,
    initial_state_idx=PREFIX_CACHING,
    cu_chunk_seqlen=PREFIX_CACHING,
    last_chunk_indices=PREFIX_CACHING,
)
def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    ssm_states: torch.Tensor | None = None,
    pad_slot_id: int = -1,
    out: torch.Tensor | None = None,
    save_states_every: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Scan every sequence of a batch; mamba_ssm's ``selective_scan_fn`` plus vLLM's packing and state slots.

    Tensors may have any strides. Token-major storage (channel stride 1, as ``x.t()`` of a ``[T, D]`` tensor
    has) is the fast one and is never copied.

    Args:
        u: ``[B, D, L]``, or packed ``[D, T]`` with ``query_start_loc``; any float dtype.
        delta: time steps before bias and softplus, shape of ``u``.
        A: ``[D, N]``, N at most 256; negative for a stable scan. Float32 is what keeps its precision.
        B, C: ``[D, N]`` constant in time, ``[B, N, L]`` or ``[B, G, N, L]``; packed: ``[N, T]`` or ``[G, N, T]``.
            Channel ``d`` reads group ``d // (D / G)``. (Constant ones packed: ``B[..., None].expand(-1, -1, T)``.)
        D: ``[D]`` skip weight.
        z: gate, shape of ``u``.
        delta_bias: ``[D]``, added to ``delta`` in float32.
        delta_softplus: apply softplus to the time steps.
        return_last_state: also return the state after each sequence.
        query_start_loc: ``[S + 1]`` int32, non-decreasing; sequence ``s`` is the tokens from ``[s]`` to before
            ``[s + 1]``, possibly none. Tokens outside all sequences are left unwritten in the output.
        cache_indices: ``[S]`` int, the slot of each sequence in ``ssm_states``; by default sequence ``s`` has
            slot ``s``. A sequence at ``pad_slot_id`` starts from zero and keeps no state. Slots are distinct and
            in range: they are read on the device and not checked. ``[S, 1]`` will do; a column of a wider table
            is copied. For a packed batch there may be more than S: the rest is ignored.
        has_initial_state: ``[S]`` bool, whether a sequence continues from its slot; by default none does.
        ssm_states: ``[slots, D, N]`` float, read where ``has_initial_state`` and written in place. An empty
            sequence leaves its initial state, zero if it has none. Slots not named stay untouched.
        pad_slot_id: the index that stands for no slot.
        out: written and returned; shape of ``u``, any float dtype. It may be ``u``, ``delta`` or ``z`` itself (vLLM
            writes over ``delta`` or ``z``) or share no memory with an argument; an overlap in part is not seen.
        save_states_every: ``k``, 1 or more: also return the states before the tokens ``0, k, 2k, ..`` of each
            sequence, the first of them its initial state. Fastest as a multiple of 8.

    Returns:
        ``out`` in the shape (and unless given the dtype) of ``u``; or a tuple of it and of what was asked for,
        ``last_state`` before ``saved_states``, both in float32 (float64 for float64 ``u``):

        * ``last_state [B or S, D, N]``.
        * ``saved_states [B, ceil(L / k), D, N]``, for a packed batch ``[T // k + S, D, N]``, with channels contiguous:
          row ``j`` is the state before token ``jk``. Packed, sequence ``s`` has the ``ceil(length / k)`` rows from
          ``query_start_loc[s] // k + s`` on; rows that no sequence has are left unwritten.

    Raises:
        ValueError: a wrong number of dimensions, size, dtype or device, a state argument without
            ``ssm_states``, or ``save_states_every`` not a whole number of 1 or more; before anything is written.
        RuntimeError: an input requires grad in grad mode, and states or ``out`` are written in place. Otherwise the
            call is that of :func:`selective_scan`, with its gradients.
    """
    floating = (u, delta, A, B, C, D, z, delta_bias, ssm_states, out)
    places = (query_start_loc, cache_indices, has_initial_state)
    check_scan(_OP, tuple(map(key_of, floating)), tuple(map(key_of, places)), save_states_every)
    packed, k, channels, n = query_start_loc is not None, save_states_every, *A.shape
    sequences = query_start_loc.shape[0] - 1 if query_start_loc is not None else u.shape[0]
    cache_indices = slot_column(_OP, "cache_indices", cache_indices, sequences if packed else None)
    if cache_indices is not None:
        check_shape(_OP, "cache_indices", cache_indices, "[S]", (sequences,))
    if ssm_states is None:
        for name, tensor in (("cache_indices", cache_indices), ("has_initial_state", has_initial_state)):
            if tensor is not None:
                raise ValueError(f"{_OP}: {name} was given without ssm_states, which it refers to; pass both")
    if wants_gradient(floating):
        for name, given in (("ssm_states", ssm_states), ("out", out), ("save_states_every", k)):
            if given is not None:
                raise RuntimeError(
                    f"{_OP}: {name} was given and an input requires grad, but what is written in place has no "
                    "gradient; call selective_scan, which takes initial_states, or call this under torch.no_grad()"
                )
        return selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus,
            query_start_loc=query_start_loc, return_final_states=return_last_state,
        )  # fmt: skip

    B, C = in_equal_groups(B, C, u, packed)
    if out is None:
        out = torch.empty_like(u)
    last_state = saved_states = None
    if return_last_state:
        last_state = torch.empty(sequences, channels, n, dtype=wide_dtype(u.dtype), device=u.device)
    if k is not None:
        rows = saved_rows(u.shape[-1], sequences, k, packed)
        saved_states = torch.empty(*rows, n, channels, dtype=wide_dtype(u.dtype), device=u.device)
    written = (ssm_states, last_state, out, saved_states)
    direct = calls_directly(u, delta, A, B, C, D, z, delta_bias, *places, *written)
    op = selective_scan_in_place if direct else torch.ops.tp_mamba.selective_scan
    op(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, without_gaps(query_start_loc),
        without_gaps(cache_indices), without_gaps(has_initial_state), ssm_states, last_state, pad_slot_id, out,
        saved_states, k or 1,
    )  # fmt: skip
    if last_state is None and saved_states is None:
        return out
    if saved_states is not None:
        saved_states = saved_states.mT
    return tuple(x for x in (out, last_state, saved_states) if x is not None)
