"""The convolution of whole sequences as autograd sees it, and its backward.

With ``p_t = bias + sum_k weight[k] x_{t - (K-1) + k}`` and ``out_t = silu(p_t)``,

    g_t = dout_t silu'(p_t)        dbias = sum_t g_t        dweight[k] = sum_t g_t x_{t - (K-1) + k}
    dx_s = sum_k weight[k] g_{s + (K-1) - k}                over the tokens of the sequence of s alone

Inputs before the first, ``x_{-(K-1)} .. x_{-1}``, are the initial state, whose gradient is dx there; the final state is
the last K - 1 inputs, whose gradient is added to theirs. So a sequence may be cut anywhere: the gradient of a piece's
initial state is that of the final state of the piece before it.

Kept for the backward are the inputs alone; p is computed anew. The forward is the inference kernel, with its bits.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.causal_conv1d.arguments import Convolution
from tp_mamba.kernels.causal_conv1d.operator import convolve
from tp_mamba.kernels.causal_conv1d.outputs import empty_rows, states_to_advance
from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.gradients import refuse_second_derivative

_FORWARD = "tp_mamba::causal_conv1d_functional"
_BACKWARD = "tp_mamba::causal_conv1d_backward"

torch.library.define(
    _FORWARD,
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, Tensor? query_start_loc, "
    "bool return_final_states) -> (Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? initial_states, Tensor? query_start_loc) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _functional(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    return_final_states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, final_states)``; no elements in the second where it is not asked for."""
    out, empty = _outputs(x, weight, query_start_loc, False)
    shape = _states_shape(x, weight, query_start_loc)
    states = states_to_advance(x, shape, initial_states, return_final_states)
    initial = initial_states is not None
    convolve(
        Convolution(out, x, weight, bias, states, query_start_loc, None, None, silu, initial, pad_slot_id=-1)
    )
    return out, states if return_final_states and states is not None else empty


def _outputs(
    x: torch.Tensor, weight: torch.Tensor, query_start_loc: torch.Tensor | None, return_final_states: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = _states_shape(x, weight, query_start_loc) if return_final_states else (0,)
    return empty_rows(x, 1 if query_start_loc is None else 0), x.new_empty(shape)


def _states_shape(
    x: torch.Tensor, weight: torch.Tensor, query_start_loc: torch.Tensor | None
) -> tuple[int, int, int]:
    sequences = x.shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1
    return sequences, weight.shape[0], weight.shape[1] - 1


def _backward(
    dout: torch.Tensor,
    dfinal_states: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dx, dweight, dbias, dinitial_states)``; the last two have no elements where there is no such input."""
    if use_triton(x):
        from tp_mamba.kernels.causal_conv1d.launch_backward import launch as run
    else:
        from tp_mamba.kernels.causal_conv1d.cpu_backward import causal_conv1d_backward_cpu as run
    gradients = _gradients(x, weight, bias, initial_states, query_start_loc)
    run(*gradients, dout, dfinal_states, x, weight, bias, silu, initial_states, query_start_loc)
    return gradients


def _gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dinitial = x.new_empty(0) if initial_states is None else initial_states.new_empty(initial_states.shape)
    dx = empty_rows(x, 1 if query_start_loc is None else 0)
    return dx, weight.new_empty(weight.shape), dbias, dinitial


torch.library.impl(_FORWARD, ("cpu", "cuda"), _functional)
torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)
refuse_second_derivative(_BACKWARD)


@torch.library.register_fake(_FORWARD)
def _functional_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, *_, query_start_loc, return_final_states = arguments
    return _outputs(x, weight, query_start_loc, return_final_states)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, _, x, weight, bias, _, initial_states, query_start_loc = arguments
    return _gradients(x, weight, bias, initial_states, query_start_loc)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, ctx.silu, initial_states, query_start_loc, ctx.final = inputs
    ctx.save_for_backward(x, weight, bias, initial_states, query_start_loc)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, dfinal: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, initial_states, query_start_loc = ctx.saved_tensors
    dfinal = dfinal if ctx.final else None
    if dout is None and dfinal is None:
        return (None,) * 7
    dx, dweight, dbias, dinitial = torch.ops.tp_mamba.causal_conv1d_backward(
        torch.zeros_like(x) if dout is None else dout,
        dfinal,
        x,
        weight,
        bias,
        ctx.silu,
        initial_states,
        query_start_loc,
    )
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None, None if initial_states is None else dinitial, None, None


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save)


def convolve_tracked(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    return_final_states: bool,
    final_states_out: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``causal_conv1d_fn`` where autograd tracks it; arguments are checked already and as there."""
    if initial_states is not None and return_final_states:
        initial_states = initial_states.to(x.dtype)  # as the states that are advanced without a gradient
    out, final_states = torch.ops.tp_mamba.causal_conv1d_functional(
        x, weight, bias, silu, initial_states, query_start_loc, return_final_states
    )
    if not return_final_states:
        return out
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)
