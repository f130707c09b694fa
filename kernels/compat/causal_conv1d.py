"""causal-conv1d 1.5's functions: ``seq_idx``, an update with a circular state, the states of packed sequences."""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn as _convolve
from tp_mamba.kernels.causal_conv1d import causal_conv1d_update as _linear_update
from tp_mamba.kernels.common.checks import (
    check_device,
    check_floating,
    check_indices,
    check_shape,
    slot_column,
)
from tp_mamba.kernels.compat.slots import read_slots, write_slots

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`tp_mamba.kernels.causal_conv1d.causal_conv1d_fn` that takes ``seq_idx`` too; differentiable as that is.

    Args:
        x, weight, bias, initial_states, return_final_states, final_states_out, activation: as there.
        seq_idx: ``[B, L]`` int: the sequence that each token belongs to; a token sees tokens of its own alone. Runs of
            equal numbers are sequences. A negative number is padding, whose outputs are zeros. Channels contiguous
            (which causal-conv1d asks for here) cost no copy of x. The host does not wait: as many sequences as tokens
            are allowed for, so that starts as ``query_start_loc``, where they are known, take less time.
        others: the keywords of that function.

    Returns:
        ``[B, D, L]`` as ``x``, or what that function returns.

    Raises:
        ValueError: ``seq_idx`` has a wrong shape, dtype or device, or comes with states or ``query_start_loc``; or as
            that function.
        RuntimeError: as that function.
    """
    op = "causal_conv1d_fn"
    if seq_idx is None:
        states = (initial_states, return_final_states, final_states_out)
        return _convolve(x, weight, bias, None, *states, activation, **others)
    check_indices(op, [("seq_idx", seq_idx)])
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {list(x.shape)}: expected [B, D, L] with seq_idx")
    check_shape(op, "seq_idx", seq_idx, "[B, L]", (x.shape[0], x.shape[2]))
    check_device(op, x.device, "x", [("seq_idx", seq_idx)])
    given = [name for name, value in others.items() if value is not None and name != "pad_slot_id"]
    if initial_states is not None or return_final_states or final_states_out is not None or given:
        named = ", ".join(given) or "states"
        raise ValueError(
            f"{op}: seq_idx does not go with {named}: pack the sequences along T and give their starts as "
            "query_start_loc instead"
        )
    B, D, L = x.shape
    out = _convolve(
        x.transpose(1, 2).reshape(B * L, D).t(), weight, bias, activation=activation, query_start_loc=_starts(seq_idx)
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out.t().view(B, L, D).transpose(1, 2).masked_fill(seq_idx[:, None] < 0, 0)


def _starts(seq_idx: torch.Tensor) -> torch.Tensor:
    """``query_start_loc`` of the runs of equal numbers in the rows of ``seq_idx [B, L]``, one row after another."""
    T = seq_idx.numel()
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    token = torch.arange(T, dtype=torch.int32, device=seq_idx.device)
    if seq_idx.is_cpu:  # noqa: SIM108 - two ways, each with its reason
        starts = token[begins.flatten()]
    else:  # how many there are would have to be waited for: the rest are empty, at the end
        starts = torch.where(begins.flatten(), token, T).sort().values.int()
    return torch.cat([starts, torch.full_like(token[:1], T)]) if T else token.new_zeros(1)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    pad_slot_id: int = -1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`tp_mamba.kernels.causal_conv1d.causal_conv1d_update` that takes a circular state too.

    Args:
        x, weight, bias, activation, conv_state_indices, pad_slot_id, out: as there.
        conv_state: ``[slots, D, state_len >= K - 1]``, written in place.
        cache_seqlens: ``[B]`` int, how many inputs each row has seen. Input ``t`` of a sequence is then in column
            ``t % state_len``, where the new ones are written too. None: the state is linear, newest input last.

    Returns:
        ``[B, D]`` or ``[B, D, L]``, as ``x``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; before anything is written.
        RuntimeError: an input requires grad while grad mode is on.
    """
    op = "causal_conv1d_update"
    if cache_seqlens is None:
        return _linear_update(
            x, conv_state, weight, bias, activation, None, conv_state_indices,
            pad_slot_id=pad_slot_id, out=out,
        )  # fmt: skip
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x has shape {list(x.shape)}: expected [B, D] or [B, D, L]")
    if weight.dim() != 2 or conv_state.dim() != 3 or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"{op}: conv_state has shape {list(conv_state.shape)} and weight {list(weight.shape)}: expected "
            "[slots, D, state_len] and [D, K] with state_len at least K - 1"
        )
    batch, past, state_len = x.shape[0], weight.shape[1] - 1, conv_state.shape[2]
    slots = slot_column(op, "conv_state_indices", conv_state_indices)
    check_indices(op, [("cache_seqlens", cache_seqlens), ("conv_state_indices", slots)])
    check_shape(op, "cache_seqlens", cache_seqlens, "[B]", (batch,))
    check_shape(op, "conv_state_indices", slots, "[B]", (batch,))
    named = [("conv_state", conv_state), ("cache_seqlens", cache_seqlens), ("conv_state_indices", slots)]
    check_device(op, x.device, "x", named)
    if slots is None and conv_state.shape[0] < batch:
        raise ValueError(
            f"{op}: conv_state has {conv_state.shape[0]} slots for {batch} rows: give each a slot, or say which one "
            "with conv_state_indices"
        )

    row = torch.arange(batch, device=x.device)
    real = row >= 0 if slots is None else slots != pad_slot_id
    slots = row if slots is None else slots
    states = read_slots(conv_state, slots, real)

    def columns(first: int, count: int) -> torch.Tensor:
        """``[B, D, count]``: the columns of the inputs from ``first`` on, counted from each row's next one."""
        at = cache_seqlens[:, None].long() + torch.arange(first, first + count, device=x.device)
        return (at % state_len)[:, None].expand(-1, states.shape[1], -1)

    y = _linear_update(
        x,
        states.gather(2, columns(-past, past)),
        weight,
        bias,
        activation,
        None,
        torch.where(real, row, -1),
        out=out,
    )
    inputs = x.unsqueeze(-1) if x.dim() == 2 else x
    kept = min(inputs.shape[2], state_len)  # of more inputs than columns only the newest stay
    first = inputs.shape[2] - kept
    states.scatter_(2, columns(first, kept), inputs[..., first:].to(states.dtype))
    write_slots(conv_state, slots, states, real)
    return y


def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """The last ``state_len`` inputs of each packed sequence: the state that a linear update goes on from.

    Args:
        x: ``[T, D]``, the inputs of all sequences, one sequence after another; any float dtype.
        cu_seqlens: ``[S + 1]`` int, ascending: sequence s holds the rows ``[s] .. [s + 1] - 1``.
        state_len: 1 or more.

    Returns:
        ``[S, D, state_len]`` in the dtype of ``x``, channels contiguous, the newest input in the last column, zeros
        before the first input of a sequence.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    op = "causal_conv1d_varlen_states"
    check_floating(op, [("x", x)])
    check_indices(op, [("cu_seqlens", cu_seqlens)])
    check_device(op, x.device, "x", [("cu_seqlens", cu_seqlens)])
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}: expected [T, D], tokens by channels")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}: expected [S + 1]")
    if not isinstance(state_len, int) or isinstance(state_len, bool) or state_len < 1:
        raise ValueError(f"{op}: state_len is {state_len!r}: expected a whole number of 1 or more")
    start, stop = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    token = stop - state_len + torch.arange(state_len, device=x.device)
    if x.shape[0] == 0:
        return x.new_zeros(token.shape[0], state_len, x.shape[1]).transpose(1, 2)
    states = x[token.clamp(min=0)].masked_fill_((token < start)[..., None], 0)
    return states.transpose(1, 2)
