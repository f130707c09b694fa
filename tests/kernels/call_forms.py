"""Adapters with the signatures under which other libraries call these operators, each a few lines over ours.

causal-conv1d's two functions and mamba_ssm's ``selective_state_update`` need none: their signatures are ours.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_state_update import selective_state_update

NULL_BLOCK_ID = 0
"""The slot that newer vLLM leaves unused, as padding; older vLLM says -1."""


def vllm_selective_scan_fn(
    u: torch.Tensor,
    ssm_states: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    null_block_id: int = NULL_BLOCK_ID,
    block_size: int = 1024,  # of prefix caching
    **prefix_caching: Any,
) -> torch.Tensor:
    """Writes its result over ``delta``, or over ``z`` where there is one."""
    y = selective_scan_fn(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus,
        query_start_loc=query_start_loc, cache_indices=cache_indices, has_initial_state=has_initial_state,
        ssm_states=ssm_states, pad_slot_id=null_block_id, out=delta if z is None else z, **prefix_caching,
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    return y


def vllm_selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    dst_state_batch_indices: torch.Tensor | None = None,
    null_block_id: int = NULL_BLOCK_ID,
    out: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """``out`` is given; without prefix caching the slots written are the slots read, the same tensor twice."""
    if dst_state_batch_indices is not state_batch_indices:
        others["dst_state_batch_indices"] = dst_state_batch_indices
    return selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices,
        pad_slot_id=null_block_id, out=out, **others,
    )  # fmt: skip


def vllm_causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | bool | None = "silu",
    null_block_id: int = NULL_BLOCK_ID,
    **prefix_caching: Any,
) -> torch.Tensor:
    """Packed only; ``True`` is SiLU; a state longer than K - 1 holds its inputs in the first columns."""
    y = causal_conv1d_fn(
        x, weight, bias, activation="silu" if activation is True else activation or None,
        query_start_loc=query_start_loc, cache_indices=cache_indices, has_initial_state=has_initial_state,
        conv_states=conv_states[..., : weight.shape[1] - 1], pad_slot_id=null_block_id, **prefix_caching,
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    return y


def vllm_causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = -1,  # of query_start_loc
    null_block_id: int = NULL_BLOCK_ID,
    **prefix_caching: Any,
) -> torch.Tensor:
    """As :func:`vllm_causal_conv1d_fn` for activation and state."""
    return causal_conv1d_update(
        x, conv_state[..., : weight.shape[1] - 1], weight, bias,
        "silu" if activation is True else activation or None, None, conv_state_indices,
        pad_slot_id=null_block_id, num_accepted_tokens=num_accepted_tokens, query_start_loc=query_start_loc,
        **prefix_caching,
    )  # fmt: skip


def mamba_ssm_selective_scan_fn(
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
    prev_state: torch.Tensor | None = None,
) -> Any:
    """Ours but for ``prev_state [B, D, N]``, which forks add: a state to start from that stays as it is."""
    states, initial = None, None
    if prev_state is not None:
        states = prev_state.clone()
        initial = torch.ones(u.shape[0], dtype=torch.bool, device=u.device)
    return selective_scan_fn(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state,
        ssm_states=states, has_initial_state=initial,
    )  # fmt: skip
