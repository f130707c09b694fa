"""One step of the selective scan: every row of a batch advances its own state slot by one token.

For every channel d (of group g), in float32, the recurrence of ``selective_scan``::

    dt = softplus(dt + dt_bias)                             # softplus(x) = x above 20
    h[n] = exp(dt * A[d, n]) * h[n] + dt * B[g, n] * x      # the slot, in place
    out = (sum_n h[n] * C[g, n] + D[d] * x) * silu(z)       # rounded here, once

The op is ``tp_mamba::selective_state_update``; it writes the state and ``out`` in place. CUDA tensors run a Triton
kernel (``mixer.py`` for the layout of a mixer, ``any.py`` for all others), the others (and float64) plain torch.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.checks import (
    PAD_SLOT_NAME,
    VLLM_FORM,
    check_device,
    check_floating,
    check_indices,
    check_shape,
    not_supported,
    refuse_grad,
    slot_column,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.remember import Key, forms, key_of, remembered
from tp_mamba.kernels.common.static_operands import declare_static_operands
from tp_mamba.kernels.common.step_shapes import check_step
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_state_update.arguments import StateUpdate, tensors_of

_OP = "selective_state_update"
_FLOATING = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "out")

torch.library.define(
    "tp_mamba::selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? state_batch_indices, int pad_slot_id, Tensor(b!) out) -> ()",
)
declare_static_operands("tp_mamba::selective_state_update", "A", "D", "dt_bias", "state_batch_indices")


def _selective_state_update(*given: Any) -> None:
    call = StateUpdate(*given)
    if not use_triton(call.x):
        from tp_mamba.kernels.selective_state_update.cpu import selective_state_update_cpu

        selective_state_update_cpu(call)
        return
    from tp_mamba.kernels.selective_state_update import any as any_layout
    from tp_mamba.kernels.selective_state_update import mixer

    arguments = (*tensors_of(call), call.dt_softplus, call.pad_slot_id)
    if not mixer.launch(*arguments):
        any_layout.launch(*arguments)


torch.library.impl("tp_mamba::selective_state_update", ("cpu", "cuda"), _selective_state_update)


@torch.library.register_fake("tp_mamba::selective_state_update")
def _selective_state_update_fake(*arguments: object) -> None:
    return None


@not_supported(
    _OP,
    null_block_id=PAD_SLOT_NAME,
    dst_state_batch_indices=VLLM_FORM,
    num_accepted_tokens=VLLM_FORM,
)
def selective_state_update(
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
    *,
    cu_seqlens: torch.Tensor | None = None,
    pad_slot_id: int = -1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advance each row's state by one token; mamba_ssm's ``selective_state_update`` with slot indices.

    Tensors may have any strides (mamba_ssm's expanded ``A``, ``dt``, ``D`` of tied heads too). Shapes in
    parentheses are those of the form with heads.

    Args:
        state: ``[slots, D, N]`` (``[slots, heads, D, N]``), any float dtype, N at most 256; updated in place.
        x: ``[B, D]`` (``[B, heads, D]``), any float dtype.
        dt: time steps before bias and softplus, shape of ``x``.
        A: ``[D, N]`` (``[heads, D, N]``); float32 is what keeps its precision.
        B, C: ``[B, N]`` or ``[B, G, N]``. Each group serves D / G neighbouring channels (heads / G heads).
        D: ``[D]`` (``[heads, D]``) skip weight.
        z: gate, shape of ``x``.
        dt_bias: ``[D]`` (``[heads, D]``), added to ``dt`` in float32.
        dt_softplus: apply softplus to the time steps.
        state_batch_indices: ``[B]`` int, the slot of each row; by default row ``b`` has slot ``b``. Slots are
            distinct and in range: they are read on the device and not checked. ``[B, 1]`` will do; a column of a
            wider table is copied.
        cu_seqlens: ``[S + 1]`` int32, non-decreasing: rows ``[s]`` to before ``[s + 1]`` are successive tokens of
            sequence ``s``, for which ``state_batch_indices`` is ``[S]``. Without heads only. It is the scan that
            runs: a sequence at ``pad_slot_id`` starts from zero, and rows outside all sequences stay unwritten.
        pad_slot_id: rows with this index change nothing and output zeros.
        out: written and returned; shape of ``x``, any float dtype; shares no memory with another argument.

    Returns:
        ``out`` in the shape (and unless given the dtype) of ``x``.

    Raises:
        ValueError: a wrong number of dimensions, size, dtype or device; before anything is written.
        RuntimeError: an input requires grad in grad mode (the op has no backward).
    """
    floating = (state, x, dt, A, B, C, D, z, dt_bias, out)
    keys = tuple(map(key_of, floating))
    _check_tensors(keys, key_of(state_batch_indices))

    if cu_seqlens is not None:
        return _several_tokens(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, cu_seqlens, pad_slot_id, out
        )  # fmt: skip
    slots = slot_column(_OP, "state_batch_indices", state_batch_indices)
    _check_shapes(keys, key_of(slots))
    refuse_grad(_OP, zip(_FLOATING, floating, strict=True))

    if out is None:
        out = torch.empty_like(x)
    direct = calls_directly(state, x, dt, A, B, C, D, z, dt_bias, slots, out)
    op = _selective_state_update if direct else torch.ops.tp_mamba.selective_state_update
    op(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, without_gaps(slots), pad_slot_id, out)
    return out


@remembered
def _check_tensors(keys: tuple[Key | None, ...], slots: Key | None) -> None:
    """Refuse wrong dtypes and devices; ``keys`` belong to ``_FLOATING``."""
    named = forms(**dict(zip(_FLOATING, keys, strict=True)))
    indices = forms(state_batch_indices=slots)
    check_floating(_OP, named)
    check_indices(_OP, indices)
    x = named[1][1]
    assert x is not None
    check_device(_OP, x.device, "x", [*named, *indices])


@remembered
def _check_shapes(keys: tuple[Key | None, ...], slots: Key | None) -> None:
    *named, (_, slots_form) = forms(**dict(zip((*_FLOATING, "slots"), (*keys, slots), strict=True)))
    given: list[Any] = [form for _, form in named]
    state, x, dt, A, B, C, D, z, dt_bias, out = given
    check_step(_OP, state, x, dt, A, B, C, D, z, dt_bias, slots_form, out)


def _several_tokens(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_batch_indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    pad_slot_id: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Successive tokens of each sequence: the scan over transposed views, from and into the slots."""
    if x.dim() != 2 or B.dim() not in (2, 3) or C.dim() not in (2, 3):
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)}, B {list(B.shape)} and C {list(C.shape)} but with cu_seqlens they "
            "must be [T, D], [T, N] or [T, G, N], and as B; flatten heads into channels"
        )
    for name, tensor in (("dt", dt), ("z", z), ("out", out)):
        check_shape(_OP, name, tensor, "[T, D]", x.shape)
    B, C = (y.t() if y.dim() == 2 else y.permute(1, 2, 0) for y in (B, C))
    y = selective_scan_fn(
        x.t(), dt.t(), A, B, C, D, None if z is None else z.t(), dt_bias, dt_softplus,
        query_start_loc=cu_seqlens,
        cache_indices=state_batch_indices,
        has_initial_state=x.new_ones(max(cu_seqlens.numel() - 1, 0), dtype=torch.bool),
        ssm_states=state,
        pad_slot_id=pad_slot_id,
        out=None if out is None else out.t(),
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    return y.t() if out is None else out
