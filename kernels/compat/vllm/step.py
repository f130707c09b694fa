"""vLLM's call of the state update: both orders of its arguments, slots to write, drafted tokens."""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.checks import check_device, check_indices, check_shape, slot_column
from tp_mamba.kernels.compat.keywords import HINT, Unused, only_defaults
from tp_mamba.kernels.compat.vllm.arguments import first_slots, no_slot
from tp_mamba.kernels.compat.vllm.drafts import update_states_of_drafts, update_states_to
from tp_mamba.kernels.selective_state_update import selective_state_update as _step

_ROUNDING = "states are rounded to nearest here: keep them in float32"
_UNUSED: Unused = {
    "is_blackwell": HINT,  # launches are chosen by the properties of the device
    "enable_stochastic_rounding": (False, _ROUNDING),
    "cache_philox_rounds": (0, _ROUNDING),
}


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    bias_or_gate: torch.Tensor | None = None,
    gate_or_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    dst_state_batch_indices: torch.Tensor | None = None,
    null_block_id: int | None = None,
    out: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    pad_slot_id: int | None = None,
    **others: object,
) -> torch.Tensor:
    """:func:`tp_mamba.kernels.selective_state_update.selective_state_update` with slots to write and drafted tokens.

    Args:
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, out: as there, with heads or without.
        bias_or_gate, gate_or_bias: ``dt_bias`` and ``z`` by position, in the order of vLLM 0.33 (``dt_bias, z``) or of
            older versions (``z, dt_bias``): the gate is the one with the dimensions of ``x``.
        state_batch_indices: ``[S]`` int, the slots to read; with ``num_accepted_tokens`` ``[S, M]``.
        dst_state_batch_indices: the slots to write, in the shape of the former; by default those.
        null_block_id, pad_slot_id: the slot number that means no slot, two names for one; 0 unless given.
        num_accepted_tokens: ``[S]`` int, how many of the last step's drafted tokens were accepted. A sequence starts
            from column ``max(accepted, 1) - 1`` of ``state_batch_indices``, and the state after its token t goes to
            column t of ``dst_state_batch_indices``. Values are read on the device and not checked.
        cu_seqlens: ``[S + 1]`` int32: rows ``[s] .. [s + 1] - 1`` are successive tokens of sequence s; heads only with
            ``num_accepted_tokens``. By default each row is a sequence.
        others: the hint ``is_blackwell``; ``enable_stochastic_rounding`` False, ``cache_philox_rounds`` 0.

    Returns:
        ``out``. Rows of sequences at the null block are zeros, or with ``cu_seqlens`` or ``num_accepted_tokens`` run
        from a state of zeros, as in vLLM.

    Raises:
        ValueError: as there; or two gates, two biases or two different numbers for no slot; or drafted tokens without
            slots.
        RuntimeError: an input requires grad while grad mode is on.
    """
    op = "selective_state_update"
    only_defaults(op, others, _UNUSED)
    null = no_slot(op, null_block_id, pad_slot_id)
    for given in (bias_or_gate, gate_or_bias):
        if given is None:
            continue
        if given.dim() == x.dim():
            z = _only(op, "z", z, given)
        else:
            dt_bias = _only(op, "dt_bias", dt_bias, given)
    sequences = x.shape[0] if cu_seqlens is None else max(cu_seqlens.numel() - 1, 0)
    source = first_slots(state_batch_indices, sequences)
    target = first_slots(dst_state_batch_indices, sequences)
    per_token = {"dt": dt, "B": B, "C": C, "z": z}
    per_channel: dict[str, Any] = {"A": A, "D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus}

    if num_accepted_tokens is not None:
        starts = torch.arange(sequences + 1, device=x.device) if cu_seqlens is None else cu_seqlens
        source, target = _check_drafts(op, source, target, num_accepted_tokens, starts, state, x)
        for name, rows in per_token.items():
            if rows is not None and (rows.dim() == 0 or rows.shape[0] != x.shape[0]):
                raise ValueError(
                    f"{op}: {name} has shape {list(rows.shape)}: expected {x.shape[0]} rows, as x has"
                )
        check_shape(op, "out", out, "the shape of x", x.shape)
        return update_states_of_drafts(
            state, source, target, null, num_accepted_tokens, x, starts, out, per_token, **per_channel
        )
    if target is None or target is source or dst_state_batch_indices is state_batch_indices:
        return _step(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, source,
            cu_seqlens=cu_seqlens, pad_slot_id=null, out=out,
        )  # fmt: skip
    source = slot_column(op, "state_batch_indices", source)
    target = slot_column(op, "dst_state_batch_indices", target)
    named = [("state_batch_indices", source), ("dst_state_batch_indices", target)]
    check_indices(op, named)
    check_device(op, x.device, "x", [*named, ("state", state)])
    for name, slots in named:
        check_shape(op, name, slots, "[S]", (sequences,))
    if source is None and state.shape[0] < sequences:
        raise ValueError(
            f"{op}: state has {state.shape[0]} slots for {sequences} sequences: give each a slot, or say which one "
            "with state_batch_indices"
        )
    assert target is not None
    return update_states_to(state, source, target, null, x, cu_seqlens, out, **per_token, **per_channel)


def _only(op: str, name: str, given: torch.Tensor | None, by_position: torch.Tensor) -> torch.Tensor:
    if given is not None:
        raise ValueError(
            f"{op}: {name} was given twice, the second of shape {list(by_position.shape)} by position: z has the "
            "dimensions of x, dt_bias one less"
        )
    return by_position


def _check_drafts(
    op: str,
    source: torch.Tensor | None,
    target: torch.Tensor | None,
    accepted: torch.Tensor,
    starts: torch.Tensor,
    state: torch.Tensor,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots to read and to write, each ``[S, M]``."""
    if source is None:
        raise ValueError(
            f"{op}: num_accepted_tokens was given without state_batch_indices, in whose columns it counts: pass both"
        )
    sequences = max(starts.numel() - 1, 0)
    check_shape(op, "cu_seqlens", starts, "[S + 1]", (sequences + 1,))
    target = source if target is None else target
    source, target = (y[:, None] if y.dim() == 1 else y for y in (source, target))
    named = [("state_batch_indices", source), ("dst_state_batch_indices", target)]
    for name, slots in named:
        if slots.dim() != 2 or slots.shape[0] != sequences or slots.shape[1] < 1:
            raise ValueError(
                f"{op}: {name} has shape {list(slots.shape)}: expected [S, M] with S = {sequences}, a column per token"
            )
    check_shape(op, "num_accepted_tokens", accepted, "[S]", (sequences,))
    index = [*named, ("num_accepted_tokens", accepted), ("cu_seqlens", starts)]
    check_indices(op, index)
    check_device(op, x.device, "x", [*index, ("state", state)])
    return source, target
