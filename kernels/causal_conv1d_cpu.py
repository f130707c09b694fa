"""The causal depthwise convolution in plain torch, without a loop over tokens.

All tokens at once as K shifted multiply-adds that ignore where sequences start, then the first ``K - 1``
tokens of every sequence again, from its state. The order of additions is the Triton kernel's. Reads indices
on the host, which costs nothing on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv1d_cpu(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    cache_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    all_initial: bool,
    zero_null: bool,
    pad_slot_id: int,
) -> None:
    """Same contract as ``causal_conv1d_triton.launch``; float64 inside for float64 input, else float32."""
    real = None  # [S] bool where some sequence has no slot
    if cache_indices is not None and pad_slot_id in cache_indices.tolist():
        real = cache_indices != pad_slot_id
    if cache_indices is not None and real is not None and zero_null:
        rows = real.nonzero().squeeze(1)
        part = torch.empty_like(x[rows])
        real_slots = cache_indices[rows]
        causal_conv1d_cpu(
            part, x[rows], weight, bias, silu, states, None, real_slots, None, all_initial, False, pad_slot_id
        )
        out.zero_()
        out[rows] = part
        return

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_BLD = x.t().unsqueeze(0) if query_start_loc is not None else x.transpose(1, 2)
    out_BLD = out.t().unsqueeze(0) if query_start_loc is not None else out.transpose(1, 2)
    weight_KD = weight.t().to(dtype)
    bias_D = None if bias is None else bias.to(dtype)
    B, L, D = x_BLD.shape
    S = query_start_loc.shape[0] - 1 if query_start_loc is not None else B
    K = weight.shape[1]
    if L >= K:
        _convolve(x_BLD.to(dtype), weight_KD, bias_D, silu, out_BLD[:, K - 1 :])

    past = x.new_zeros((S, D, K - 1))
    slots: torch.Tensor | None = None
    if states is not None:
        past = states[:S]
        if cache_indices is not None:
            slots = (cache_indices if real is None else torch.where(real, cache_indices, 0)).long()
            past = states.index_select(0, slots)
        initial = real if all_initial else x.new_zeros(S, dtype=torch.bool)
        if has_initial_state is not None:
            initial = has_initial_state if real is None else has_initial_state & real
        if initial is not None:
            past = torch.where(initial.view(S, 1, 1), past, 0)
    state_len = past.shape[2]

    if query_start_loc is not None:
        starts, lengths = query_start_loc[:-1].long(), query_start_loc.diff()
        first, last = int(query_start_loc[0]), int(query_start_loc[-1])
        out[:, :first] = 0
        out[:, last:] = 0
        if last == first:
            return
        steps = torch.arange(K - 1, device=x.device)
        inside = steps < lengths.view(S, 1)
        tokens = (starts.view(S, 1) + steps).clamp_max(last - 1)
        heads = x.new_empty((S, K - 1, D), dtype=dtype)
        history = past[..., state_len - (K - 1) :].transpose(1, 2).to(dtype)
        _convolve(torch.cat([history, x_BLD[0, tokens].to(dtype)], 1), weight_KD, bias_D, silu, heads)
        out_BLD[0, tokens[inside]] = heads[inside].to(out.dtype)
        if states is None:
            return
        position = lengths.view(S, 1) - state_len + torch.arange(state_len, device=x.device)
        newest = x[:, (starts.view(S, 1) + position).clamp(0, L - 1)].transpose(0, 1).to(states.dtype)
        kept = past.gather(2, (position + state_len).clamp_max(state_len - 1).unsqueeze(1).expand(-1, D, -1))
        new = torch.where(position.unsqueeze(1) < 0, kept, newest)
        written = lengths > 0 if real is None else real & (lengths > 0)
        slots = torch.arange(S, device=x.device) if slots is None else slots
        states.index_copy_(0, slots[written], new[written])
        return

    if L == 0:
        return
    n = min(L, K - 1)
    inputs = torch.cat([past, x[..., :n]], 2)
    window = inputs[..., state_len - (K - 1) :].transpose(1, 2).to(dtype)
    _convolve(window, weight_KD, bias_D, silu, out_BLD[:, :n])
    if states is None:
        return
    new = inputs[..., n:] if n == L else torch.cat([past[..., L:], x[..., max(L - state_len, 0) :]], 2)
    if slots is None:
        states[:S] = new
    elif real is None:
        states.index_copy_(0, slots, new.to(states.dtype))
    else:
        states.index_copy_(0, slots[real], new[real].to(states.dtype))


def _convolve(
    x_BLD: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_D: torch.Tensor | None,
    silu: bool,
    out_BLD: torch.Tensor,
) -> None:
    """``out[:, t] = silu(bias + sum_k x[:, t + k] * weight[k])`` in the dtype of ``x``, then cast."""
    n = out_BLD.shape[1]
    acc = out_BLD if out_BLD.dtype == x_BLD.dtype else torch.empty_like(out_BLD, dtype=x_BLD.dtype)
    if bias_D is None:
        torch.mul(x_BLD[:, :n], weight_KD[0], out=acc)
    else:
        torch.addcmul(bias_D, x_BLD[:, :n], weight_KD[0], out=acc)
    for k in range(1, weight_KD.shape[0]):
        acc.addcmul_(x_BLD[:, k : k + n], weight_KD[k])
    if silu:
        F.silu(acc, inplace=True)
    if acc is not out_BLD:
        out_BLD.copy_(acc)
