"""The selective scan with gradients: a functional op, its backward as a second op, and the function that calls them.

The forward is that of the in-place op, bit for bit. It also saves the state before every :data:`SAVE_EVERY`-th token of
each sequence, float32: ``4 N / SAVE_EVERY`` bytes per token and channel, 1 at N = 16, which is all that is saved beside
the inputs. The backward recomputes the states in between from them, forward, as they were computed at first: the
recurrence run backwards from the last state would divide by decays that may be zero.

With ``g`` the gradient of the ungated output, ``lam`` that of the states, ``a = exp(dt A)``, ``'`` for the next token::

    g    = grad_out * silu(z)
    dz   = grad_out * y * silu'(z)
    lam  = C g + a' lam'                     # from the last token, where a' lam' is the final state's gradient
    e    = lam * a * h_before                # the gradient of dt * A
    dC   = sum_d h g            dB = sum_d lam dt u             dA = sum_t e dt         dD = sum_t g u
    du   = g D + dt sum_n lam B                                 d(initial) = a lam of the first token
    d(dt)   = sum_n e A + u sum_n lam B                         ddelta = d(dt) softplus'(delta + bias)
    d(bias) = sum_t ddelta

Sums over channels and tokens are taken in one order: the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.checks import check_device, check_floating, check_shape, without_gaps
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered
from tp_mamba.kernels.selective_scan.arguments import ScanBackward
from tp_mamba.kernels.selective_scan.checks import check_scan, in_equal_groups, saved_rows, wants_gradient
from tp_mamba.kernels.selective_scan.cpu_backward import selective_scan_backward_cpu
from tp_mamba.kernels.selective_scan.operator import selective_scan_in_place

_OP = "selective_scan"

SAVE_EVERY, SAVE_EVERY_CPU = 64, 16
"""Tokens from one saved state to the next. In plain torch a stretch of states should fit a cache."""

torch.library.define(
    "tp_mamba::selective_scan_functional",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_states, bool delta_softplus, Tensor? query_start_loc, int save_every) "
    "-> (Tensor out, Tensor final_states, Tensor saved_states)",
)
torch.library.define(
    "tp_mamba::selective_scan_backward",
    "(Tensor grad_out, Tensor? grad_final, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor saved_states, bool delta_softplus, Tensor? query_start_loc, int save_every, "
    "bool has_initial) -> Tensor[]",
)


def _outputs(
    u: torch.Tensor,
    A: torch.Tensor,
    initial_states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    save_every: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``out, final_states, saved_states``, not yet written; without ``save_every`` the last one is empty."""
    packed, dtype, (channels, n) = query_start_loc is not None, wide_dtype(u.dtype), A.shape
    sequences = query_start_loc.shape[0] - 1 if query_start_loc is not None else u.shape[0]
    rows = saved_rows(u.shape[-1], sequences, save_every, packed) if save_every else (0,)
    saved = u.new_empty(*rows, n, channels, dtype=dtype)
    if initial_states is None:
        return torch.empty_like(u), u.new_empty(sequences, channels, n, dtype=dtype), saved
    # Laid out as saved states are: channels contiguous.
    return torch.empty_like(u), u.new_empty(sequences, n, channels, dtype=dtype).mT, saved


def _forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    delta_softplus: bool,
    query_start_loc: torch.Tensor | None,
    save_every: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, final, saved = _outputs(u, A, initial_states, query_start_loc, save_every)
    initial = states = None
    if initial_states is not None:
        states = final.copy_(initial_states)
        initial = torch.ones(len(final), dtype=torch.bool, device=u.device)
    selective_scan_in_place(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, query_start_loc, None, initial, states,
        final if states is None else None, -1, out, saved if save_every else None, save_every or 1,
    )  # fmt: skip
    if query_start_loc is not None:
        if use_triton(u):
            from tp_mamba.kernels.selective_scan.outside import zero_outside

            zero_outside(out, query_start_loc)
        else:
            _zero_outside(out, query_start_loc)
    return out, final, saved


def _backward(*arguments: Any) -> list[torch.Tensor]:
    call = ScanBackward(*arguments)
    grads = call.gradients()
    if use_triton(call.u):
        from tp_mamba.kernels.selective_scan.backward import selective_scan_backward

        selective_scan_backward(call, grads)
        return [x for x in grads if x is not None]
    selective_scan_backward_cpu(call, grads)
    if call.query_start_loc is not None:
        for x in (grads.u, grads.delta, grads.z, grads.B, grads.C):
            if x is not None:
                _zero_outside(x, call.query_start_loc)
    return [x for x in grads if x is not None]


def _zero_outside(x: torch.Tensor, starts: torch.Tensor) -> None:
    """Zeros for the tokens (the last dimension) that no sequence has, which nothing has written."""
    first, stop = int(starts[0]), int(starts[-1])
    x[..., :first] = 0
    x[..., stop:] = 0


torch.library.impl("tp_mamba::selective_scan_functional", ("cpu", "cuda"), _forward)
torch.library.impl("tp_mamba::selective_scan_backward", ("cpu", "cuda"), _backward)


@torch.library.register_fake("tp_mamba::selective_scan_functional")
def _forward_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(args[0], args[2], args[8], args[10], args[11])


@torch.library.register_fake("tp_mamba::selective_scan_backward")
def _backward_fake(*args: Any) -> list[torch.Tensor]:
    return [x for x in ScanBackward(*args).gradients() if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (
        u, delta, A, B, C, D, z, delta_bias, initial_states, ctx.delta_softplus, query_start_loc, ctx.save_every,
    ) = inputs  # fmt: skip
    saved = output[2]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, query_start_loc, saved)
    ctx.initial_dtype = None if initial_states is None else initial_states.dtype


def _gradients(
    ctx: Any, grad_out: torch.Tensor | None, grad_final: torch.Tensor | None, _: None
) -> tuple[torch.Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias, query_start_loc, saved = ctx.saved_tensors
    if grad_out is None:
        if grad_final is None:
            return (None,) * 12
        grad_out = torch.zeros_like(u)
    arguments = (
        grad_out,
        grad_final,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        saved,
        ctx.delta_softplus,
        query_start_loc,
    )
    has_initial = ctx.initial_dtype is not None
    grads = iter(torch.ops.tp_mamba.selective_scan_backward(*arguments, ctx.save_every, has_initial))
    present = (True,) * 5 + (D is not None, z is not None, delta_bias is not None, has_initial)
    of_inputs = [next(grads) if given else None for given in present]
    if of_inputs[8] is not None:
        of_inputs[8] = of_inputs[8].to(ctx.initial_dtype)
    return (*of_inputs, None, None, None)


def _no_second_gradient(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        f"{_OP}: a gradient of its gradient was asked for, but there is none; call backward without create_graph"
    )


torch.library.register_autograd("tp_mamba::selective_scan_functional", _gradients, setup_context=_keep)
torch.library.register_autograd("tp_mamba::selective_scan_backward", _no_second_gradient)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    query_start_loc: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    return_ungated: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Scan every sequence of a batch, with gradients for every tensor but ``query_start_loc``; writes nothing in place.

    The output has the bits of :func:`selective_scan_fn`. In a mixer's form, which is the fast one: ``u, delta, z`` as
    ``x.t()`` of ``[T, D]``, B and C as that of ``[T, N]`` (float32 as the norms give them), ``delta`` after softplus.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as there.
        query_start_loc: ``[S + 1]`` int32, as there. For tokens outside all sequences output and gradients are zero.
        initial_states: ``[S, D, N]`` (``[B, D, N]`` for a dense batch), any float dtype: the state that each sequence
            starts from; by default zero. So a sequence may be scanned in segments: the final states of one are the
            initial states of the next, and gradients flow back through them.
        return_final_states: also return the state after each sequence. An empty sequence gives its initial state.
        return_ungated: also return y, rounded to the dtype of ``u``. The gate is then a step of its own on the rounded
            y, as in models that share it (SambaY): ``out`` is not the bits of a call without this.

    Returns:
        ``out`` in the shape and dtype of ``u``; or a tuple of it and of what was asked for:

        * ``final_states [S, D, N]`` in float32 (float64 for float64 ``u``);
        * ``y``, which is ``out`` before the gate.

    Raises:
        ValueError: a wrong number of dimensions, size, dtype or device; before any work.
        RuntimeError: a second gradient is asked for.
    """
    floating = (u, delta, A, B, C, D, z, delta_bias, None, None)
    tensors = (*floating[:8], initial_states)
    _check(tuple(map(key_of, floating)), key_of(query_start_loc), key_of(initial_states))
    B, C = in_equal_groups(B, C, u, query_start_loc is not None)
    wants_grad = wants_gradient(tensors)
    save_every = SAVE_EVERY if use_triton(u) else SAVE_EVERY_CPU
    direct = not wants_grad and calls_directly(*tensors, query_start_loc)
    op = _forward if direct else torch.ops.tp_mamba.selective_scan_functional
    out, final_states, _ = op(
        u, delta, A, B, C, D, None if return_ungated else z, delta_bias, initial_states, delta_softplus,
        without_gaps(query_start_loc), save_every if wants_grad else 0,
    )  # fmt: skip
    asked: tuple[torch.Tensor, ...] = (final_states,) if return_final_states else ()
    if return_ungated:
        y, dtype = out, wide_dtype(u.dtype)
        out = y if z is None else (y.to(dtype) * torch.nn.functional.silu(z.to(dtype))).to(u.dtype)
        asked += (y,)
    return (out, *asked) if asked else out


@remembered
def _check(keys: tuple[Key | None, ...], starts: Key | None, initial: Key | None) -> None:
    """Refuse what does not fit; ``keys`` as :func:`check_scan` takes them."""
    check_scan(_OP, keys, (starts, None, None), None)
    u, A = Form(*keys[0]), Form(*keys[2])  # type: ignore[misc]
    named = forms(initial_states=initial)
    check_floating(_OP, named)
    check_device(_OP, u.device, "u", named)
    sequences = u.shape[0] if starts is None else starts[0][0] - 1
    check_shape(_OP, "initial_states", named[0][1], "[S, D, N]", (sequences, *A.shape))
