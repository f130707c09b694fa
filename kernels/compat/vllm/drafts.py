"""Drafted tokens of vLLM's speculative decoding: several per sequence, of which the next step keeps some.

How many of the last step's tokens were accepted, ``accepted [S]``, is known on the device alone. A step starts from the
state after the last accepted one, and leaves behind what a start after any of its own tokens needs. Everything here is
made of the operators and of torch's gather and scatter; the host never waits.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn
from tp_mamba.kernels.compat.slots import read_slots, write_slots
from tp_mamba.kernels.selective_state_update import selective_state_update


def convolve_drafts(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    slots: torch.Tensor,
    accepted: torch.Tensor,
    starts: torch.Tensor,
    null_block_id: int,
) -> torch.Tensor:
    """The convolution of the tokens of a step, and the window of inputs that the next one chooses from.

    A slot's columns hold the inputs ``w_0, w_1, ..`` of the last step's window. If ``a`` of that step's tokens were
    accepted (at least 1), the past inputs are ``w_(a - 1) .. w_(a + K - 3)``, K - 1 of them. The new window is those
    but the oldest, then all tokens of this step: K - 2 + n columns for n tokens. Columns behind them stay.

    Args:
        x: ``[T, D]``, the tokens of all sequences, one sequence after another.
        conv_state: ``[slots, D, state_len]``, written in place; ``state_len`` at least K - 2 + n for every sequence.
        weight, bias, activation: as for the convolution, ``weight [D, K]``.
        slots: ``[S]`` int, distinct but for the null block, whose sequences run from zeros and leave nothing.
        accepted: ``[S]`` int; less than 1 counts as 1.
        starts: ``[S + 1]`` int: sequence s holds the tokens ``[s] .. [s + 1] - 1``, perhaps none: its slot stays then.

    Returns:
        ``[T, D]``.
    """
    past, state_len = weight.shape[1] - 1, conv_state.shape[2]
    first, stop = starts[:-1, None].long(), starts[1:, None].long()
    real = slots != null_block_id
    window = read_slots(conv_state, slots, real)
    # Clamped, so that no count whatever reads outside the window.
    begin = (accepted[:, None].long() - 1).clamp(0, state_len - past)
    column = torch.arange(state_len, device=x.device)

    def columns(at: torch.Tensor) -> torch.Tensor:
        return window.gather(2, at[:, None].expand(-1, window.shape[1], -1))

    y = causal_conv1d_fn(
        x.t(), weight, bias, activation=activation, query_start_loc=starts,
        conv_states=columns(begin + column[:past]), has_initial_state=real,
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    if x.shape[0] == 0:
        return y.t()

    token = first + column - (past - 1)  # which one goes to a column of the new window, where one does
    holds_token = (column >= past - 1) & (token < stop)
    kept = columns(torch.where(column < past - 1, begin + 1 + column, column))
    new = x[token.clamp(0, x.shape[0] - 1)].transpose(1, 2).to(kept.dtype)
    window = torch.where(holds_token[:, None], new, kept)
    write_slots(conv_state, slots, window, real & (stop > first)[:, 0])
    return y.t()


def update_states_to(
    state: torch.Tensor,
    source: torch.Tensor | None,
    target: torch.Tensor,
    null_block_id: int,
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor | None,
    **inputs: Any,
) -> torch.Tensor:
    """A state update that starts from the slots ``source [S]`` and leaves its states in ``target [S]``.

    Args:
        state, x, cu_seqlens, out: as for :func:`selective_state_update`.
        source, target: int; source None: slot s. A sequence whose source is the null block leaves no state; nor does
            one without tokens (``cu_seqlens``), or whose target is the null block. Targets are distinct.
        inputs: the operator's further arguments.
    """
    rows = torch.arange(target.shape[0], device=x.device)
    real = rows >= 0 if source is None else source != null_block_id
    states = read_slots(state, rows if source is None else source, real)
    indices = torch.where(real, rows, -1)
    y = selective_state_update(
        states, x, state_batch_indices=indices, cu_seqlens=cu_seqlens, out=out, **inputs
    )
    if cu_seqlens is not None:
        real = real & (cu_seqlens.diff() > 0)
    write_slots(state, target, states, real & (target != null_block_id))
    return y


def update_states_of_drafts(
    state: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    null_block_id: int,
    accepted: torch.Tensor,
    x: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor | None,
    per_token: dict[str, Any],
    **inputs: Any,
) -> torch.Tensor:
    """A state update that leaves the state after every one of its tokens in a slot of its own.

    Args:
        state: ``[slots, D, N]`` or ``[slots, heads, D, N]``, written in place; between the tokens of a step states are
            in float32 (float64 for float64 ``x``).
        source: ``[S, M]`` int: a sequence starts from the slot in column ``max(accepted, 1) - 1``. From the null block
            it runs from zeros and leaves no states.
        target: ``[S, M]`` int: the state after token t of a sequence goes to column t, but to no null block. As many
            columns as a sequence has tokens, or more; slots are distinct.
        accepted: ``[S]`` int.
        x: ``[T, D]`` or ``[T, heads, D]``; ``per_token``: dt, B, C, z of as many rows.
        cu_seqlens: ``[S + 1]`` int: sequence s holds the rows ``[s] .. [s + 1] - 1``, perhaps none.
        out: written and returned; rows outside all sequences stay unwritten.
        inputs: the operator's further arguments.
    """
    out = torch.empty_like(x) if out is None else out
    if x.shape[0] == 0 or source.shape[0] == 0:
        selective_state_update(state[:0], x[:0], out=out[:0], **_rows(per_token, slice(0)), **inputs)
        return out
    begin = (accepted[:, None].long() - 1).clamp(0, source.shape[1] - 1)
    source = source.gather(1, begin)[:, 0]
    real = source != null_block_id
    states = read_slots(state, source, real).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows = torch.arange(source.shape[0], device=x.device)
    first, count = cu_seqlens[:-1].long(), cu_seqlens.diff()
    for t in range(target.shape[1]):
        live = count > t
        token = (first + t).clamp(max=x.shape[0] - 1)
        y = out.new_empty(rows.shape[0], *x.shape[1:])
        indices = torch.where(live, rows, -1)
        selective_state_update(
            states, x[token], state_batch_indices=indices, out=y, **_rows(per_token, token), **inputs
        )
        write_slots(out, token, y, live)
        write_slots(state, target[:, t], states, live & real & (target[:, t] != null_block_id))
    return out


def _rows(tensors: dict[str, Any], at: torch.Tensor | slice) -> dict[str, Any]:
    return {name: None if x is None else x[at] for name, x in tensors.items()}
