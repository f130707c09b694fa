"""Selective scan, the recurrence of Mamba-1, over dense or packed sequences.

For every channel d (of group g) and token t, in float32::

    dt = softplus(delta + delta_bias)                       # softplus(x) = x above 20
    h[n] = exp(dt * A[d, n]) * h[n] + dt * B[g, n, t] * u   # n = 0..N-1, h = 0 or the given state at first
    y = sum_n h[n] * C[g, n, t] + D[d] * u
    out = y * silu(z)                                       # rounded here, once

The op is ``tp_mamba::selective_scan``; it writes ``out`` and the states in place. CUDA tensors run a Triton kernel
(``mixer.py`` for the layout of a mixer, ``any.py`` for all others), the others (and float64) plain torch (``cpu.py``).
``reference.py`` holds the loop that all are tested with.

A token's bits depend on its own sequence alone, not on the rest of the batch; in the kernels (given a float32 state)
not on where a prompt was cut either. Plain torch keeps to the latter as far as torch's own operators do: it sums states
by a batched product with one small matrix per token, of which a cut changes the number.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tp_mamba.kernels.common.checks import (
    PAD_SLOT_NAME,
    PREFIX_CACHING,
    check_device,
    check_floating,
    check_indices,
    check_mask,
    check_shape,
    not_supported,
    refuse_grad,
    slot_column,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.common.limits import check_state_size
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered
from tp_mamba.kernels.selective_scan.arguments import SelectiveScan
from tp_mamba.kernels.selective_scan.operands import strides_of

_OP = "selective_scan_fn"
_FLOATING = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "ssm_states", "out")

torch.library.define(
    "tp_mamba::selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? query_start_loc, Tensor? cache_indices, Tensor? has_initial_state, "
    "Tensor(a!)? ssm_states, Tensor(b!)? last_state, int pad_slot_id, Tensor(c!) out, "
    "Tensor(d!)? saved_states=None, int save_states_every=1) -> ()",
)


def _selective_scan(*arguments: Any) -> None:
    call = SelectiveScan(*arguments)
    if not use_triton(call.u):
        from tp_mamba.kernels.selective_scan.cpu import selective_scan_cpu

        selective_scan_cpu(call)
        return
    from tp_mamba.kernels.selective_scan import any as any_layout
    from tp_mamba.kernels.selective_scan import mixer

    strides = strides_of(call)
    kernel = mixer if mixer.serves(call, strides) else any_layout
    kernel.launch(call, strides)


torch.library.impl("tp_mamba::selective_scan", ("cpu", "cuda"), _selective_scan)


@torch.library.register_fake("tp_mamba::selective_scan")
def _selective_scan_fake(*args: object) -> None:
    return None


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
        RuntimeError: an input requires grad in grad mode (the op has no backward).
    """
    floating = (u, delta, A, B, C, D, z, delta_bias, ssm_states, out)
    places = (query_start_loc, cache_indices, has_initial_state)
    _check(tuple(map(key_of, floating)), tuple(map(key_of, places)), save_states_every)
    packed, k, channels, n = query_start_loc is not None, save_states_every, *A.shape
    sequences = query_start_loc.shape[0] - 1 if query_start_loc is not None else u.shape[0]
    cache_indices = slot_column(_OP, "cache_indices", cache_indices, sequences if packed else None)
    if cache_indices is not None:
        check_shape(_OP, "cache_indices", cache_indices, "[S]", (sequences,))
    if ssm_states is None:
        for name, tensor in (("cache_indices", cache_indices), ("has_initial_state", has_initial_state)):
            if tensor is not None:
                raise ValueError(f"{_OP}: {name} was given without ssm_states, which it refers to; pass both")
    refuse_grad(_OP, zip(_FLOATING, floating, strict=True))

    B, C = _by_group(B, u, packed), _by_group(C, u, packed)
    # One of them constant in time (a group a channel), or two numbers of groups.
    if B.shape[-3] != C.shape[-3]:
        groups = math.lcm(B.shape[-3], C.shape[-3])
        B, C = _in_groups(B, groups), _in_groups(C, groups)
    if out is None:
        out = torch.empty_like(u)
    last_state = saved_states = None
    if return_last_state:
        last_state = torch.empty(sequences, channels, n, dtype=wide_dtype(u.dtype), device=u.device)
    if k is not None:
        # Rows of two sequences never meet: first // k + ceil(length / k) <= (first + length) // k + 1.
        rows = (u.shape[-1] // k + sequences,) if packed else (sequences, -(-u.shape[-1] // k))
        saved_states = torch.empty(*rows, n, channels, dtype=wide_dtype(u.dtype), device=u.device)
    written = (ssm_states, last_state, out, saved_states)
    direct = calls_directly(u, delta, A, B, C, D, z, delta_bias, *places, *written)
    op = _selective_scan if direct else torch.ops.tp_mamba.selective_scan
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


@remembered
def _check(keys: tuple[Key | None, ...], places: tuple[Key | None, ...], k: int | None) -> None:
    """Refuse what does not fit; ``keys`` belong to ``_FLOATING``, ``places`` to starts, slots and initial states."""
    named = forms(**dict(zip(_FLOATING, keys, strict=True)))
    starts, slots, initial = (None if key is None else Form(*key) for key in places)
    given: list[Any] = [form for _, form in named]
    u, delta, A, B, C, D, z, delta_bias, ssm_states, out = given
    indices = [("query_start_loc", starts), ("cache_indices", slots)]
    check_floating(_OP, named)
    check_indices(_OP, indices)
    check_device(_OP, u.device, "u", [*named, *indices, ("has_initial_state", initial)])

    packed = starts is not None
    dims = "[D, T]" if packed else "[B, D, L]"
    if len(u.shape) != (2 if packed else 3):
        remedy = "drop query_start_loc" if packed else "give query_start_loc for a packed batch"
        raise ValueError(
            f"{_OP}: u has {len(u.shape)} dimensions but {dims} is expected here; reshape u or {remedy}"
        )
    if starts is not None and (len(starts.shape) != 1 or starts.shape[0] == 0):
        raise ValueError(
            f"{_OP}: query_start_loc has shape {list(starts.shape)} but must be [S + 1]; "
            "pass the first token of each of S sequences and the end of the last"
        )
    if len(A.shape) != 2:
        raise ValueError(
            f"{_OP}: A has shape {list(A.shape)} but must be [D, N]; pass one row of states per channel"
        )
    channels, n = u.shape[-2], A.shape[1]
    sequences = starts.shape[0] - 1 if starts is not None else u.shape[0]
    check_state_size(f"{_OP}: A", n)
    for name, form in (("delta", delta), ("z", z), ("out", out)):
        check_shape(_OP, name, form, dims, u.shape)
    check_shape(_OP, "A", A, "[D, N]", (channels, n))
    check_shape(_OP, "D", D, "[D]", (channels,))
    check_shape(_OP, "delta_bias", delta_bias, "[D]", (channels,))
    for name, form in (("B", B), ("C", C)):
        _check_groups(name, form, u, n, packed)
    check_shape(_OP, "has_initial_state", initial, "[S]", (sequences,))
    check_mask(_OP, "has_initial_state", initial)
    if ssm_states is not None:
        slots_needed = sequences if slots is None else 0
        if (
            len(ssm_states.shape) != 3
            or ssm_states.shape[1:] != A.shape
            or ssm_states.shape[0] < slots_needed
        ):
            raise ValueError(
                f"{_OP}: ssm_states has shape {list(ssm_states.shape)} but must be [slots, D, N] with D = {channels}, "
                f"N = {n} and at least {slots_needed} slots; allocate it so or pass cache_indices"
            )
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise ValueError(
            f"{_OP}: save_states_every is {k!r} but must be an int of 1 or more; "
            "pass the number of tokens from one saved state to the next, or None to save none"
        )


def _check_groups(name: str, x: Form, u: Form, n: int, packed: bool) -> None:
    """Refuse a B or C whose shape does not fit that of ``u``."""
    (channels, length), dim = u.shape[-2:], len(x.shape)
    if not packed and dim == 2:
        check_shape(_OP, name, x, "[D, N]", (channels, n))
        return
    dims = "[N, T] or [G, N, T]" if packed else "[D, N], [B, N, L] or [B, G, N, L]"
    one_group = dim == len(u.shape)
    if (
        not (one_group or dim == len(u.shape) + 1)
        or x.shape[-2:] != (n, length)
        or (not packed and x.shape[0] != u.shape[0])
    ):
        raise ValueError(
            f"{_OP}: {name} has shape {list(x.shape)} but must be {dims} with N = {n} and "
            f"{'T' if packed else 'L'} = {length} for u of shape {list(u.shape)}; reshape {name}"
        )
    groups = 1 if one_group else x.shape[-3]
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{_OP}: {name} has {groups} groups for {channels} channels but G must divide D; regroup {name}"
        )


def _by_group(x: torch.Tensor, u: torch.Tensor, packed: bool) -> torch.Tensor:
    """B or C as a view ``[B, G, N, L]``, packed ``[G, N, T]``; one constant in time has a group a channel."""
    if not packed and x.dim() == 2:
        return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1])
    return x.unsqueeze(-3) if x.dim() == u.dim() else x


def _in_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[..., G, N, L]`` with each group ``groups / G`` times in a row; a copy only if ``1 < G < groups``."""
    if x.shape[-3] in (1, groups):
        return x.expand(*x.shape[:-3], groups, *x.shape[-2:])
    return x.repeat_interleave(groups // x.shape[-3], dim=-3)
