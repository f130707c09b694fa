"""What a convolution allocates."""

from __future__ import annotations

import torch


def empty_rows(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """An uninitialised tensor of x's shape; channels contiguous where x has them so, else the last axis."""
    if x.stride(channel_dim) != 1:
        return x.new_empty(x.shape)
    token_major = x.movedim(channel_dim, -1)
    return x.new_empty(token_major.shape).movedim(-1, channel_dim)


def states_to_advance(
    x: torch.Tensor,
    shape: tuple[int, ...],
    initial_states: torch.Tensor | None,
    return_final_states: bool,
    final_states_out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The states ``[S, D, K - 1]`` that a kernel advances in place: a copy of the initial ones, or zeros, or None."""
    if initial_states is None and not return_final_states:
        return None
    dtype = initial_states.dtype if initial_states is not None and not return_final_states else x.dtype
    states = x.new_empty(shape, dtype=dtype) if final_states_out is None else final_states_out
    return states.zero_() if initial_states is None else states.copy_(initial_states)
