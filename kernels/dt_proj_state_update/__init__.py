"""Mamba's dt_proj, softplus and one step of the selective scan, in one pass: what a decoded token needs of the three.

    delta = softplus(dt @ weight.T + bias)                                       # linear_softplus
    out = selective_state_update(state, x, delta, A, B, C, D, z, ...)

Bit for bit what these two give, one after the other (the first for up to 64 rows at a time: more rows it may sum in
another order). On a GPU one kernel does both where it can (``mixer.py``): the product is as short as the time steps of
a few channels are, so that it hides under the reading of their states. Everything else runs the two (``any.py``), on a
CPU too.

The op is ``tp_mamba::dt_proj_state_update``; it writes the state and ``out`` in place.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.checks import (
    check_device,
    check_floating,
    check_indices,
    refuse_grad,
    slot_column,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.product_shapes import check_product
from tp_mamba.kernels.common.remember import Key, forms, key_of, remembered
from tp_mamba.kernels.common.static_operands import declare_static_operands
from tp_mamba.kernels.common.step_shapes import check_step
from tp_mamba.kernels.dt_proj_state_update.arguments import DtProjStateUpdate, tensors_of

_OP = "dt_proj_state_update"
_FLOATING = ("state", "x", "dt", "weight", "bias", "A", "B", "C", "D", "z", "out")

torch.library.define(
    "tp_mamba::dt_proj_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? state_batch_indices, int pad_slot_id, Tensor(b!) out) -> ()",
)
declare_static_operands("tp_mamba::dt_proj_state_update", "weight", "bias", "A", "D", "state_batch_indices")


def _dt_proj_state_update(*arguments: Any) -> None:
    call = DtProjStateUpdate(*arguments)
    if use_triton(call.x):
        from tp_mamba.kernels.dt_proj_state_update.mixer import launch

        if launch(*tensors_of(call), call.pad_slot_id):
            return
    from tp_mamba.kernels.dt_proj_state_update.any import in_two_steps

    in_two_steps(call)


torch.library.impl("tp_mamba::dt_proj_state_update", ("cpu", "cuda"), _dt_proj_state_update)


@torch.library.register_fake("tp_mamba::dt_proj_state_update")
def _dt_proj_state_update_fake(*arguments: object) -> None:
    return None


def dt_proj_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    state_batch_indices: torch.Tensor | None = None,
    *,
    pad_slot_id: int = -1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advance each row's state by one token, from the few numbers that its time steps are a linear map of.

    Args:
        state: ``[slots, D, N]``, any float dtype, N at most 256; updated in place.
        x: ``[B, D]``, any float dtype.
        dt: ``[B, R]``, what dt_proj maps to time steps; any float dtype.
        weight: ``[D, R]`` in the dtype of ``dt``.
        bias: ``[D]`` in any float dtype, or None.
        A: ``[D, N]``; float32 is what keeps its precision.
        B, C: ``[B, N]``.
        D: ``[D]`` skip weight.
        z: gate, shape of ``x``.
        state_batch_indices: ``[B]`` int, the slot of each row; by default row ``b`` has slot ``b``. Slots are
            distinct and in range: they are read on the device and not checked.
        pad_slot_id: rows with this index change nothing and output zeros.
        out: written and returned; shape of ``x``, any float dtype; shares no memory with another argument.

    Returns:
        ``out`` in the shape (and unless given the dtype) of ``x``.

    Raises:
        ValueError: a wrong number of dimensions, size, dtype or device; before anything is written.
        RuntimeError: an input requires grad in grad mode (the op has no backward).
    """
    slots = slot_column(_OP, "state_batch_indices", state_batch_indices)
    floating = (state, x, dt, weight, bias, A, B, C, D, z, out)
    _check(tuple(map(key_of, floating)), key_of(slots))
    refuse_grad(_OP, zip(_FLOATING, floating, strict=True))
    if out is None:
        out = torch.empty_like(x)
    direct = calls_directly(state, x, dt, weight, bias, A, B, C, D, z, slots, out)
    op = _dt_proj_state_update if direct else torch.ops.tp_mamba.dt_proj_state_update
    op(state, x, dt, weight, without_gaps(bias), A, B, C, D, z, without_gaps(slots), pad_slot_id, out)
    return out


@remembered
def _check(keys: tuple[Key | None, ...], slots_key: Key | None) -> None:
    """Refuse wrong shapes, dtypes and devices; ``keys`` belong to ``_FLOATING``."""
    named = forms(**dict(zip(_FLOATING, keys, strict=True)))
    indices = forms(state_batch_indices=slots_key)
    check_floating(_OP, named)
    check_indices(_OP, indices)
    given: list[Any] = [form for _, form in named]
    state, x, dt, weight, bias, A, B, C, D, z, out = given
    slots = indices[0][1]
    check_device(_OP, x.device, "x", [*named, *indices])
    if len(x.shape) != 2 or len(B.shape) != 2:
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} and B {list(B.shape)} but must be [B, D] and [B, N]; for heads or "
            "groups call linear_softplus and selective_state_update"
        )
    check_product(_OP, dt, weight, bias, name="dt")
    if (dt.shape[0], weight.shape[0]) != tuple(x.shape):
        raise ValueError(
            f"{_OP}: dt has {dt.shape[0]} rows and weight {weight.shape[0]} but x of shape {list(x.shape)} wants one "
            "per row and one per channel; pass those of x"
        )
    check_step(_OP, state, x, None, A, B, C, D, z, None, slots, out)
