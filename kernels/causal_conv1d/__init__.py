"""Causal depthwise convolution with bias and SiLU, over dense or packed sequences, and its one-step update.

For channel ``d`` of a sequence with inputs ``x_0 .. x_{L-1}`` and ``K`` taps,

    out_t = silu(bias + sum_{k < K} weight[d, k] * x_{t - (K-1) + k})

where inputs before the first come from the sequence's state, or are zero. The sum is taken in float32
(float64 for float64 input), oldest tap first, and cast once to the dtype of ``x``. A state holds the last
``state_len >= K - 1`` inputs of a sequence, the newest in the last column, in a dtype of its own.

Signatures and shapes are those of causal-conv1d 1.5; what packing and serving need is keyword-only, under
vLLM's names. Any strides are taken; channels contiguous (a ``[D, T]`` view of token-major memory) is the fast
case. In the kernel a token's bits depend on the inputs under its taps alone: not on the batch, nor on where a
prompt was cut (given a state that holds the inputs exactly).
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.causal_conv1d.backward import convolve_tracked
from tp_mamba.kernels.causal_conv1d.operator import convolve_in_place, update_in_place
from tp_mamba.kernels.causal_conv1d.outputs import empty_rows, states_to_advance
from tp_mamba.kernels.common.checks import (
    PAD_SLOT_NAME,
    PREFIX_CACHING,
    VLLM_FORM,
    check_device,
    check_floating,
    check_indices,
    check_mask,
    not_supported,
    refuse_grad,
    slot_column,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import calls_directly
from tp_mamba.kernels.common.gradients import refuse_in_place, tracks_grad
from tp_mamba.kernels.common.limits import ACTIVATIONS, check_activation, check_conv_width
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered

_STATES = "pass initial_states and return_final_states=True, or call it under torch.no_grad()"


@not_supported(
    "causal_conv1d_fn",
    null_block_id=PAD_SLOT_NAME,
    block_idx_first_scheduled_token=PREFIX_CACHING,
    block_idx_last_scheduled_token=PREFIX_CACHING,
    initial_state_idx=PREFIX_CACHING,
    num_computed_tokens=PREFIX_CACHING,
)
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    conv_states: torch.Tensor | None = None,
    pad_slot_id: int = -1,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convolve whole sequences, from and into states where given.

    Args:
        x: ``[B, D, L]``, or packed ``[D, T]`` with ``query_start_loc``; float32, bfloat16, float16, float64.
        weight: ``[D, K]`` with K from 2 to 4, any float dtype.
        bias: ``[D]`` or None.
        seq_idx: not supported; say where sequences start with ``query_start_loc``.
        initial_states: ``[B or S, D, K - 1]``: every sequence starts from its own; excludes ``conv_states``.
        return_final_states: also return the states after the last token, ``[B or S, D, K - 1]`` in x's dtype.
        final_states_out: where those are written instead of a new tensor.
        activation: None, ``"silu"`` or ``"swish"`` (the same).
        query_start_loc: ``[S + 1]`` int32, ascending: sequence s holds tokens ``[s] .. [s + 1] - 1``, perhaps
            none. Tokens outside all sequences give zeros.
        cache_indices: ``[S]`` int32, each sequence's slot in ``conv_states``, none twice; by default slot s.
            ``pad_slot_id``: no slot, the sequence starts from zeros and leaves no state. ``[S, 1]`` will do.
            For a packed batch there may be more than S: the rest is ignored.
        has_initial_state: ``[S]`` bool: start from the slot, not from zeros. By default none does.
        conv_states: ``[slots, D, state_len >= K - 1]``, written in place. A sequence without tokens leaves its slot
            as it was if it starts from it, and zeros if not, as the scan does. (vLLM keeps the inputs of a longer
            state in its first columns: pass ``conv_states[..., : K - 1]``.)
        pad_slot_id: the index that means no slot.
        out: written and returned; shape and dtype of ``x``, sharing no memory with it.

    Returns:
        ``out``, or ``(out, final_states)`` with ``return_final_states``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or excludes another.
        RuntimeError: an input requires grad in grad mode, and ``conv_states`` or ``out`` would be written in place.

    Differentiable in x, weight, bias and initial_states, from both results: ``backward.py``. The forward's bits are
    the same with and without a gradient; x is kept for the backward.
    """
    if seq_idx is not None:
        raise ValueError(
            "causal_conv1d_fn: seq_idx is not supported: pack the sequences along T and give their starts "
            "as query_start_loc, or call the function of the same name in tp_mamba.kernels.compat.causal_conv1d"
        )
    channel_dim = 1 if query_start_loc is None else 0
    if x.dim() != channel_dim + 2:
        expected = (
            "[D, T] with query_start_loc" if channel_dim == 0 else "[B, D, L], or [D, T] with query_start_loc"
        )
        raise ValueError(f"causal_conv1d_fn: x has shape {list(x.shape)}: expected {expected}")
    states_given = {
        "conv_states": conv_states,
        "initial_states": initial_states,
        "final_states_out": final_states_out,
    }
    silu = _check("causal_conv1d_fn", x, channel_dim, weight, bias, activation, out, **states_given)
    if query_start_loc is not None and (query_start_loc.dim() != 1 or query_start_loc.shape[0] < 1):
        raise ValueError(
            f"causal_conv1d_fn: query_start_loc has shape {list(query_start_loc.shape)}: expected [S + 1]"
        )
    channels, width = weight.shape
    num_seqs = x.shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1
    packed_seqs = None if query_start_loc is None else num_seqs
    cache_indices = slot_column("causal_conv1d_fn", "cache_indices", cache_indices, packed_seqs)
    _check_sequences("causal_conv1d_fn", "query_start_loc", query_start_loc, num_seqs + 1, x)
    _check_sequences("causal_conv1d_fn", "cache_indices", cache_indices, num_seqs, x)
    _check_sequences("causal_conv1d_fn", "has_initial_state", has_initial_state, num_seqs, x)
    if conv_states is None and (cache_indices is not None or has_initial_state is not None):
        raise ValueError(
            "causal_conv1d_fn: cache_indices and has_initial_state refer to conv_states, which is None: "
            "pass it too"
        )
    if conv_states is not None and (initial_states is not None or return_final_states):
        raise ValueError(
            "causal_conv1d_fn: conv_states is read and written in place: leave out initial_states and "
            "return_final_states"
        )
    if conv_states is not None and cache_indices is None and conv_states.shape[0] < num_seqs:
        raise ValueError(
            f"causal_conv1d_fn: conv_states has {conv_states.shape[0]} slots for {num_seqs} sequences: "
            "give each a slot, or say which one with cache_indices"
        )
    if final_states_out is not None and not return_final_states:
        raise ValueError(
            "causal_conv1d_fn: final_states_out was given without return_final_states: set it to True"
        )
    shape = (num_seqs, channels, width - 1)
    for name, given in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if given is not None and given.shape != shape:
            raise ValueError(
                f"causal_conv1d_fn: {name} has shape {list(given.shape)}: expected {list(shape)}, "
                "sequences by channels by K - 1"
            )

    if tracks_grad(x, weight, bias, out, *states_given.values()):
        refuse_in_place("causal_conv1d_fn", out=(out, "leave it out"), conv_states=(conv_states, _STATES))
        options = (initial_states, query_start_loc, return_final_states, final_states_out)
        return convolve_tracked(x, weight, without_gaps(bias), silu, *options)

    if out is None:
        out = empty_rows(x, channel_dim)
    states, all_initial = conv_states, initial_states is not None
    if states is None:  # the op advances states in place: it is handed a copy
        states = states_to_advance(x, shape, initial_states, return_final_states, final_states_out)
    tensors = (out, x, weight, without_gaps(bias), states, query_start_loc, cache_indices, has_initial_state)
    op = convolve_in_place if calls_directly(*tensors) else torch.ops.tp_mamba.causal_conv1d
    op(*tensors, silu, all_initial, pad_slot_id)
    return (out, states) if return_final_states and states is not None else out


@not_supported(
    "causal_conv1d_update",
    null_block_id=PAD_SLOT_NAME,
    query_start_loc=VLLM_FORM,
    num_accepted_tokens=VLLM_FORM,
    block_idx_last_scheduled_token=PREFIX_CACHING,
    initial_state_idx=PREFIX_CACHING,
)
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
    """Advance every sequence by one token, or by L, from and into its state.

    Args:
        x: ``[B, D]`` or ``[B, D, L]``; float32, bfloat16, float16 or float64.
        conv_state: ``[slots, D, state_len >= K - 1]``, written in place.
        weight, bias, activation: as for :func:`causal_conv1d_fn`.
        cache_seqlens: not supported; the state is linear, newest input last.
        conv_state_indices: ``[B]`` int32, each row's slot, no slot twice; by default slot b. Rows with
            ``pad_slot_id`` change nothing and give zeros. ``[B, 1]`` will do.
        pad_slot_id: the index that means no slot.
        out: written and returned; shape and dtype of ``x``, sharing no memory with it.

    Returns:
        ``out``, in the shape of ``x``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: an input requires grad in grad mode: the state is written in place.
    """
    if cache_seqlens is not None:
        raise ValueError(
            "causal_conv1d_update: cache_seqlens (a circular state) is not supported: keep a linear state, newest "
            "input last, or call the function of the same name in tp_mamba.kernels.compat.causal_conv1d"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"causal_conv1d_update: x has shape {list(x.shape)}: expected [B, D] or [B, D, L]")
    silu = _check("causal_conv1d_update", x, 1, weight, bias, activation, out, conv_state=conv_state)
    named = (("x", x), ("weight", weight), ("bias", bias), ("out", out), ("conv_state", conv_state))
    refuse_grad("causal_conv1d_update", named)
    conv_state_indices = slot_column("causal_conv1d_update", "conv_state_indices", conv_state_indices)
    _check_sequences("causal_conv1d_update", "conv_state_indices", conv_state_indices, x.shape[0], x)
    if conv_state_indices is None and conv_state.shape[0] < x.shape[0]:
        raise ValueError(
            f"causal_conv1d_update: conv_state has {conv_state.shape[0]} slots for {x.shape[0]} rows: "
            "give each a slot, or say which one with conv_state_indices"
        )
    if out is None:
        out = empty_rows(x, 1)
    direct = calls_directly(out, x, conv_state, weight, bias, conv_state_indices)
    op = update_in_place if direct else torch.ops.tp_mamba.causal_conv1d_update
    op(out, x, conv_state, weight, without_gaps(bias), silu, conv_state_indices, pad_slot_id)
    return out


def _check(
    op: str,
    x: torch.Tensor,
    channel_dim: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out: torch.Tensor | None,
    **states: torch.Tensor | None,
) -> bool:
    """Refuse what no form of call allows; returns whether to apply SiLU."""
    if activation is not None and activation not in ACTIVATIONS:
        check_activation(f"{op}: the call", activation)
    keys: tuple[tuple[str, Key | None], ...] = ()
    for name, state in states.items():
        keys += ((name, key_of(state)),)
    _check_forms(op, key_of(x), channel_dim, key_of(weight), key_of(bias), key_of(out), keys)
    return activation is not None


@remembered
def _check_forms(
    op: str,
    x_key: Key,
    channel_dim: int,
    weight_key: Key,
    bias: Key | None,
    out_key: Key | None,
    states: tuple[tuple[str, Key | None], ...],
) -> None:
    x, weight = Form(*x_key), Form(*weight_key)
    inputs = [*forms(x=x_key, weight=weight_key, bias=bias, out=out_key), *forms(**dict(states))]
    check_floating(op, inputs)
    check_device(op, x.device, "x", inputs)
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}: expected [D, K]")
    channels, width = weight.shape
    check_conv_width(f"{op}: weight {list(weight.shape)}", width)
    if x.shape[channel_dim] != channels:
        raise ValueError(
            f"{op}: x of shape {list(x.shape)} has {x.shape[channel_dim]} channels and weight {channels}: "
            "expected the same number"
        )
    if bias is not None and bias[0] != (channels,):
        raise ValueError(
            f"{op}: bias has shape {list(bias[0])}: expected [{channels}], one value per channel"
        )
    if out_key is not None and out_key[:2] != x_key[:2]:
        raise ValueError(
            f"{op}: out is {out_key[1]} {list(out_key[0])}: expected the dtype and shape of x, "
            f"{x.dtype} {list(x.shape)}"
        )
    for name, state in states:
        if state is not None and (len(state[0]) != 3 or state[0][1] != channels or state[0][2] < width - 1):
            raise ValueError(
                f"{op}: {name} has shape {list(state[0])}: expected slots or sequences by "
                f"{channels} channels by at least {width - 1} past inputs"
            )


def _check_sequences(op: str, name: str, index: torch.Tensor | None, length: int, x: torch.Tensor) -> None:
    """Refuse a per-sequence tensor of a wrong length, dtype or device; its values stay on the device."""
    if index is not None:
        _check_index(op, name, key_of(index), length, x.device)
        if not index.is_contiguous():
            raise ValueError(f"{op}: {name} has stride {index.stride(0)}: pass a contiguous tensor")


@remembered
def _check_index(op: str, name: str, key: Key, length: int, device: torch.device) -> None:
    index = Form(*key)
    if index.shape != (length,):
        raise ValueError(f"{op}: {name} has shape {list(index.shape)}: expected [{length}]")
    if name == "has_initial_state":
        check_mask(op, name, index)
    else:
        check_indices(op, [(name, index)])
    check_device(op, device, "x", [(name, index)])
