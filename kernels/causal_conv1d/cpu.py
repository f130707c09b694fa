"""The causal depthwise convolution in plain torch: K shifted multiply-adds, in the Triton kernel's order.

A sequence's first ``K - 1`` tokens are convolved together with its state, the others straight from the input, a
cacheful at a time. Packed sequences follow one another. Reads indices on the host, which costs nothing on a CPU.

Everything here is token-major, ``[.., L, D]``: a state of shape ``[slots, D, K-1]`` is read as ``[slots, K-1, D]``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from tp_mamba.kernels.causal_conv1d.arguments import Convolution
from tp_mamba.kernels.common.dtypes import wide_dtype

_BLOCK_ELEMENTS = 3 << 17  # of the output at a time: 1.5 MiB of float32


def causal_conv1d_cpu(call: Convolution) -> None:
    """What the call says; float64 inside for float64 input, else float32."""
    x, out, weight, bias, silu = call.x, call.out, call.weight, call.bias, call.silu
    pad_slot_id, zero_null = call.pad_slot_id, call.zero_null
    query_start_loc, cache_indices = call.query_start_loc, call.cache_indices
    dtype = wide_dtype(x.dtype)
    filters = (weight.t().to(dtype), None if bias is None else bias.to(dtype), silu)
    past = None if call.states is None else call.states.transpose(1, 2)
    x, out = x.transpose(-2, -1), out.transpose(-2, -1)
    sequences = x.shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1
    slots = list(range(sequences)) if cache_indices is None else cache_indices.tolist()
    real = [cache_indices is None or slot != pad_slot_id for slot in slots]
    if past is not None and zero_null and all(real):
        _convolve_rows(out, x, *filters, past, None if cache_indices is None else slots)
        return

    if query_start_loc is None:
        pieces = [(x[s], out[s]) for s in range(sequences)]
    else:
        starts = query_start_loc.tolist()
        out[: starts[0]] = 0
        out[starts[-1] :] = 0
        pieces = [(x[start:stop], out[start:stop]) for start, stop in pairwise(starts)]
    initial = [call.all_initial] * sequences
    if call.has_initial_state is not None:
        initial = call.has_initial_state.tolist()
    for s, (x_LD, out_LD) in enumerate(pieces):
        if zero_null and not real[s]:
            out_LD.zero_()
            continue
        state = past[slots[s]] if past is not None and real[s] else None
        if state is not None and not initial[s]:
            state.zero_()
        _convolve_rows(out_LD[None], x_LD[None], *filters, None if state is None else state[None], None)


def _convolve_rows(
    out: torch.Tensor,
    x: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_D: torch.Tensor | None,
    silu: bool,
    states: torch.Tensor | None,
    slots: list[int] | None,
) -> None:
    """Rows of one length, ``x, out [B, L, D]``, each from and into its slot (row b: slot b) of ``[slots, K-1, D]``."""
    B, L, D = x.shape
    K = len(weight_KD)
    tokens = max(1, _BLOCK_ELEMENTS // max(1, B * D))
    # With a tap's channels side by side torch works on vectors of them; for a few tokens the copy is not worth it.
    taps_KD = weight_KD.contiguous() if L >= K else weight_KD
    for first in range(0, L - K + 1, tokens):
        into = out[:, first + K - 1 : first + K - 1 + tokens]
        _convolve(x[:, first : first + tokens + K - 1], taps_KD, bias_D, silu, into)

    scattered: torch.Tensor | None = None
    if states is None:
        past = x.new_zeros(B, K - 1, D)
    elif slots is None or B == 1:
        states = states[:B] if slots is None else states[slots[0] : slots[0] + 1]
        past = states
    else:
        scattered = torch.tensor(slots, dtype=torch.int64, device=x.device)
        past = states.index_select(0, scattered)
    state_len, n = past.shape[1], min(L, K - 1)
    inputs = torch.cat([past, x.narrow(1, 0, n)], 1)
    window = inputs.narrow(1, state_len - (K - 1), K - 1 + n)
    _convolve(window, weight_KD, bias_D, silu, out.narrow(1, 0, n))
    if states is not None:
        new = (
            inputs.narrow(1, n, state_len)
            if n == L
            else torch.cat([past[:, L:], x[:, max(L - state_len, 0) :]], 1)
        )
        if scattered is None:
            states.copy_(new)
        else:
            states.index_copy_(0, scattered, new.to(states.dtype))


def _convolve(
    x: torch.Tensor, weight_KD: torch.Tensor, bias_D: torch.Tensor | None, silu: bool, out: torch.Tensor
) -> None:
    """``out[:, t] = silu(bias + sum_k x[:, t + k] * weight[k])`` in the dtype of ``weight``, then cast."""
    n = out.shape[1]
    x, taps = x.to(weight_KD.dtype), weight_KD.unbind()
    acc = out if out.dtype == x.dtype else torch.empty_like(out, dtype=x.dtype)
    if bias_D is None:
        torch.mul(x.narrow(1, 0, n), taps[0], out=acc)
    else:
        torch.addcmul(bias_D, x.narrow(1, 0, n), taps[0], out=acc)
    for k in range(1, len(taps)):
        acc.addcmul_(x.narrow(1, k, n), taps[k])
    if silu:
        F.silu(acc, inplace=True)
    if acc is not out:
        out.copy_(acc)
