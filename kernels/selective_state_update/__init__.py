"""One step of the selective scan: every row of a batch advances its own state slot by one token.

For every channel d (of group g), in float32, the recurrence of ``selective_scan.py``::

    dt = softplus(dt + dt_bias)                             # softplus(x) = x above 20
    h[n] = exp(dt * A[d, n]) * h[n] + dt * B[g, n] * x      # the slot, in place
    out = (sum_n h[n] * C[g, n] + D[d] * x) * silu(z)       # rounded here, once

The op is ``tp_mamba::selective_state_update``; it writes the state and ``out`` in place. CUDA tensors run the
Triton kernel, the others (and float64) plain torch.
"""

from __future__ import annotations

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
from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.limits import check_state_size
from tp_mamba.kernels.selective_scan import selective_scan_fn

_OP = "selective_state_update"

torch.library.define(
    "tp_mamba::selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? state_batch_indices, int pad_slot_id, Tensor(b!) out) -> ()",
)


@torch.library.impl("tp_mamba::selective_state_update", ("cpu", "cuda"))
def _selective_state_update(
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
    pad_slot_id: int,
    out: torch.Tensor,
) -> None:
    if use_triton(x):
        from tp_mamba.kernels.selective_state_update.any import selective_state_update_triton as run
    else:
        from tp_mamba.kernels.selective_state_update.cpu import selective_state_update_cpu as run
    run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id, out)


@torch.library.register_fake("tp_mamba::selective_state_update")
def _selective_state_update_fake(*args: object) -> None:
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
    named = [
        ("state", state), ("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C),
        ("D", D), ("z", z), ("dt_bias", dt_bias), ("out", out),
    ]  # fmt: skip
    indices = [("state_batch_indices", state_batch_indices)]
    check_floating(_OP, named)
    check_indices(_OP, indices)
    check_device(_OP, x.device, "x", named + indices)

    if cu_seqlens is not None:
        return _several_tokens(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, cu_seqlens, pad_slot_id, out
        )  # fmt: skip
    state_batch_indices = check_step(_OP, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, out)
    refuse_grad(_OP, named)

    if out is None:
        out = torch.empty_like(x)
    torch.ops.tp_mamba.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, without_gaps(state_batch_indices), pad_slot_id, out
    )
    return out


def check_step(
    op: str,
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state_batch_indices: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor | None:
    """Refuse, in the name of ``op``, shapes that do not fit one another; returns the slots as ``[B]``."""
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x has {x.dim()} dimensions but must be [B, D] or [B, heads, D]; reshape x")
    channels = x.shape[1:]
    per_channel, dims = ("[D]", "[B, D]") if x.dim() == 2 else ("[heads, D]", "[B, heads, D]")
    if A.dim() != len(channels) + 1:
        raise ValueError(
            f"{op}: A has shape {list(A.shape)} but x of shape {list(x.shape)} wants {per_channel} and N; "
            "give A a row of states for every channel"
        )
    n = A.shape[-1]
    check_state_size(f"{op}: A", n)
    for name, tensor in (("dt", dt), ("z", z), ("out", out)):
        check_shape(op, name, tensor, dims, x.shape)
    check_shape(op, "A", A, f"{per_channel[:-1]}, N]", (*channels, n))
    check_shape(op, "D", D, per_channel, channels)
    check_shape(op, "dt_bias", dt_bias, per_channel, channels)
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() not in (2, 3) or tensor.shape[0] != x.shape[0] or tensor.shape[-1] != n:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)} but must be [B, N] or [B, G, N] with B = {x.shape[0]} "
                f"and N = {n}; reshape {name}"
            )
    groups = B.shape[1] if B.dim() == 3 else 1
    check_shape(op, "C", C, "the shape of B", B.shape)
    if groups == 0 or channels[0] % groups:
        of = "channels" if x.dim() == 2 else "heads"
        raise ValueError(
            f"{op}: B has {groups} groups for {channels[0]} {of} but G must divide their number; regroup B"
        )
    state_batch_indices = slot_column(op, "state_batch_indices", state_batch_indices)
    check_shape(op, "state_batch_indices", state_batch_indices, "[B]", (x.shape[0],))
    slots_needed = x.shape[0] if state_batch_indices is None else 0
    if state.shape[1:] != A.shape or state.shape[0] < slots_needed:
        raise ValueError(
            f"{op}: state has shape {list(state.shape)} but must be [slots, *A.shape] with A of shape {list(A.shape)} "
            f"and at least {slots_needed} slots; allocate it so or pass state_batch_indices"
        )
    return state_batch_indices


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
