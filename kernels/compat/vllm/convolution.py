"""vLLM's calls of the convolution: states fourth and in the first columns, packed and drafted tokens in the update."""

from __future__ import annotations

import torch

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn as _convolve
from tp_mamba.kernels.causal_conv1d import causal_conv1d_update as _step
from tp_mamba.kernels.common.checks import check_device, check_indices, check_shape, slot_column
from tp_mamba.kernels.compat.keywords import HINT, Unused, only_defaults
from tp_mamba.kernels.compat.vllm.arguments import BLOCKS, no_slot
from tp_mamba.kernels.compat.vllm.drafts import convolve_drafts

_UNUSED: Unused = BLOCKS | {
    "metadata": HINT,  # plans the launches of vLLM's own kernel
    "validate_data": HINT,  # arguments are always checked here
}
_UNUSED_OF_UPDATE: Unused = _UNUSED | {
    "retrieve_parent_token": (None, "drafts are one token after another here, not a tree"),
}


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | bool | None = "silu",
    null_block_id: int | None = None,
    *,
    pad_slot_id: int | None = None,
    block_size_to_align: int = 0,
    **others: object,
) -> torch.Tensor:
    """:func:`tp_mamba.kernels.causal_conv1d.causal_conv1d_fn` of a packed batch, states fourth.

    Args:
        x, weight, bias, query_start_loc, cache_indices, has_initial_state: as there, ``x [D, T]``.
        conv_states: ``[slots, D, state_len >= K - 1]``, written in place: the first K - 1 columns hold the inputs.
        activation: None or False, ``"silu"``, ``"swish"`` or True (all three the same).
        null_block_id, pad_slot_id: the slot number that means no slot, two names for one; 0 unless given.
        block_size_to_align: of prefix caching, which is off: of no effect.
        others: the tensors of prefix caching, which must be None; the hints ``metadata`` and ``validate_data``.

    Returns:
        ``[D, T]``, channels contiguous where those of ``x`` are.

    Raises:
        ValueError: as there; or an argument of prefix caching; or two different numbers for no slot.
        RuntimeError: an input requires grad while grad mode is on.
    """
    op = "causal_conv1d_fn"
    only_defaults(op, others, _UNUSED)
    y = _convolve(
        x, weight, bias, activation=_name(activation),
        query_start_loc=query_start_loc, cache_indices=cache_indices, has_initial_state=has_initial_state,
        conv_states=_columns_in_use(conv_states, weight), pad_slot_id=no_slot(op, null_block_id, pad_slot_id),
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    return y


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = -1,
    null_block_id: int | None = None,
    *,
    pad_slot_id: int | None = None,
    **others: object,
) -> torch.Tensor:
    """:func:`tp_mamba.kernels.causal_conv1d.causal_conv1d_update` with packed tokens and drafted tokens.

    Args:
        x: ``[B, D]``, ``[B, D, L]``, or with ``query_start_loc`` ``[T, D]``, several successive tokens per sequence.
        conv_state: ``[slots, D, state_len >= K - 1]``, written in place: the first K - 1 columns hold the past inputs.
            With ``num_accepted_tokens`` at least K - 2 + n columns for n tokens of a sequence, see
            :func:`tp_mamba.kernels.compat.vllm.drafts.convolve_drafts`.
        weight, bias: as there.
        activation: None or False, ``"silu"``, ``"swish"`` or True (all three the same).
        conv_state_indices: ``[S]`` int, the slot of each sequence; by default slot s.
        num_accepted_tokens: ``[S]`` int, how many of the last step's tokens of each sequence were accepted: it goes on
            from there. Values are read on the device and not checked.
        query_start_loc: ``[S + 1]`` int32: rows ``[s] .. [s + 1] - 1`` of ``x`` belong to sequence s, perhaps none.
        max_query_len: with both of the former, the most tokens of a sequence.
        null_block_id, pad_slot_id: the slot number that means no slot, two names for one; 0 unless given.
        others: the tensors of prefix caching and ``retrieve_parent_token``, which must be None; the hints ``metadata``
            and ``validate_data``.

    Returns:
        As ``x``. Rows of sequences at the null block are zeros, or with ``query_start_loc`` start from zeros.

    Raises:
        ValueError: as there; or an argument of prefix caching; or two different numbers for no slot; or a state with
            too few columns for the drafted tokens.
        RuntimeError: an input requires grad while grad mode is on.
    """
    op = "causal_conv1d_update"
    only_defaults(op, others, _UNUSED_OF_UPDATE)
    null = no_slot(op, null_block_id, pad_slot_id)
    if query_start_loc is not None and (
        x.dim() != 2 or query_start_loc.dim() != 1 or len(query_start_loc) < 1
    ):
        raise ValueError(
            f"{op}: x has shape {list(x.shape)} and query_start_loc {list(query_start_loc.shape)}: expected [T, D] and "
            "[S + 1]"
        )
    if query_start_loc is None and x.dim() not in (2, 3):
        raise ValueError(f"{op}: x has shape {list(x.shape)}: expected [B, D] or [B, D, L]")
    sequences = x.shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1
    slots = slot_column(op, "conv_state_indices", conv_state_indices, sequences)
    if num_accepted_tokens is None and query_start_loc is None:
        states = _columns_in_use(conv_state, weight)
        return _step(x, states, weight, bias, _name(activation), None, slots, pad_slot_id=null)
    if num_accepted_tokens is None:
        y = _convolve(
            x.t(), weight, bias, activation=_name(activation), query_start_loc=query_start_loc, cache_indices=slots,
            has_initial_state=x.new_ones(sequences, dtype=torch.bool),
            conv_states=_columns_in_use(conv_state, weight), pad_slot_id=null,
        )  # fmt: skip
        assert isinstance(y, torch.Tensor)
        return y.t()

    longest = max_query_len if query_start_loc is not None else 1 if x.dim() == 2 else x.shape[2]
    if query_start_loc is not None and longest < 1:
        raise ValueError(f"{op}: max_query_len is {longest}: give the most tokens that a sequence has")
    _check_drafts(op, x, conv_state, weight, slots, num_accepted_tokens, query_start_loc, sequences, longest)
    if slots is None:
        slots, null = torch.arange(sequences, device=x.device), -1
    call = (conv_state, weight, bias, _name(activation), slots, num_accepted_tokens)
    if query_start_loc is not None:
        return convolve_drafts(x, *call, query_start_loc, null)
    rows = x.unsqueeze(1) if x.dim() == 2 else x.transpose(1, 2)  # [B, L, D]
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=x.device) * rows.shape[1]
    y = convolve_drafts(rows.reshape(-1, rows.shape[2]), *call, starts, null).view(rows.shape)
    y = y.masked_fill((slots == null)[:, None, None], 0).transpose(1, 2)
    return y[..., 0] if x.dim() == 2 else y


def _check_drafts(
    op: str,
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    slots: torch.Tensor | None,
    accepted: torch.Tensor,
    starts: torch.Tensor | None,
    sequences: int,
    longest: int,
) -> None:
    """Refuse what the operator, which sees windows of ``conv_state`` only, cannot."""
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}: expected [D, K]")
    needed = weight.shape[1] - 2 + max(longest, 1)
    if conv_state.dim() != 3 or conv_state.shape[2] < needed:
        raise ValueError(
            f"{op}: conv_state has shape {list(conv_state.shape)}: expected [slots, D, state_len] with at least "
            f"{needed} columns, K - 2 and one for each of {max(longest, 1)} tokens"
        )
    if slots is None and conv_state.shape[0] < sequences:
        raise ValueError(
            f"{op}: conv_state has {conv_state.shape[0]} slots for {sequences} sequences: give each a slot, or say "
            "which one with conv_state_indices"
        )
    per_sequence = [("conv_state_indices", slots), ("num_accepted_tokens", accepted)]
    check_indices(op, [*per_sequence, ("query_start_loc", starts)])
    for name, index in per_sequence:
        check_shape(op, name, index, "[S]", (sequences,))
    check_device(op, x.device, "x", [*per_sequence, ("conv_state", conv_state), ("query_start_loc", starts)])


def _columns_in_use(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """vLLM's longer states hold the inputs in their first columns; what has other dimensions is for the checks."""
    return states[..., : weight.shape[1] - 1] if weight.dim() == 2 and states.dim() == 3 else states


def _name(activation: str | bool | None) -> str | None:
    if isinstance(activation, bool):
        return "silu" if activation else None
    return activation or None
