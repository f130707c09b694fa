"""The causal depthwise convolution written out, token by token: the oracle of the tests.

Computes in float64 for float64 input and in float32 otherwise; the result is cast to the dtype of ``x``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.dtypes import wide_dtype


def causal_conv1d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    conv_states: torch.Tensor | None = None,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """What ``causal_conv1d_fn`` computes for ``x [B, D, L]`` or packed ``[D, T]``; writes ``conv_states``."""
    out = torch.zeros_like(x)
    if query_start_loc is None:
        sequences = list(zip(x.unbind(0), out.unbind(0), strict=True))
    else:
        cuts = list(zip(query_start_loc.tolist()[:-1], query_start_loc.tolist()[1:], strict=True))
        sequences = [(x[:, start:stop], out[:, start:stop]) for start, stop in cuts]
    for s, (x_s, out_s) in enumerate(sequences):
        state = None
        if conv_states is not None:
            slot = s if cache_indices is None else int(cache_indices[s])
            state = None if cache_indices is not None and slot == pad_slot_id else conv_states[slot]
        initial = state is not None and has_initial_state is not None and bool(has_initial_state[s])
        _sequence(x_s, out_s, weight, bias, activation, state, initial)
    return out


def causal_conv1d_update_reference(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """What ``causal_conv1d_update`` computes for ``x [B, D]`` or ``[B, D, L]``; writes ``conv_state``."""
    x_BDL = x.unsqueeze(-1) if x.dim() == 2 else x
    out = torch.zeros_like(x_BDL)
    for b in range(x_BDL.shape[0]):
        slot = b if conv_state_indices is None else int(conv_state_indices[b])
        if conv_state_indices is None or slot != pad_slot_id:
            _sequence(x_BDL[b], out[b], weight, bias, activation, conv_state[slot], True)
    return out.view(x.shape) if x.dim() == 2 else out


def _sequence(
    x_DL: torch.Tensor,
    out_DL: torch.Tensor,
    weight_DK: torch.Tensor,
    bias_D: torch.Tensor | None,
    activation: str | None,
    state: torch.Tensor | None,
    initial: bool,
) -> None:
    """One sequence into ``out_DL``, from ``state [D, state_len]`` if ``initial``, else from zeros; advances it."""
    dtype = wide_dtype(x_DL.dtype)
    (D, K), L = weight_DK.shape, x_DL.shape[1]
    state_len = K - 1 if state is None else state.shape[1]
    past = (
        state.to(dtype)
        if state is not None and initial
        else torch.zeros(D, state_len, dtype=dtype, device=x_DL.device)
    )
    inputs = torch.cat([past, x_DL.to(dtype)], dim=1)
    for t in range(L):
        newest = state_len + t
        y = (inputs[:, newest - K + 1 : newest + 1] * weight_DK.to(dtype)).sum(1)
        if bias_D is not None:
            y = y + bias_D.to(dtype)
        out_DL[:, t] = y if activation is None else F.silu(y)
    if state is not None and (L > 0 or not initial):
        state.copy_(inputs[:, L:])
