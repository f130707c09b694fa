"""The shapes of one token of the recurrence: what the operators that advance states by one step check."""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.checks import Operand, check_shape
from tp_mamba.kernels.common.limits import check_state_size

_LETTERS = {2: ("[B, D]", "[D]", "[D, N]"), 3: ("[B, heads, D]", "[heads, D]", "[heads, D, N]")}
"""Dimensions of x -> how the shapes of x, of D and of A are spelled."""


def check_step(
    op: str,
    state: Operand,
    x: Operand,
    dt: Operand | None,
    A: Operand,
    B: Operand,
    C: Operand,
    D: Operand | None,
    z: Operand | None,
    dt_bias: Operand | None,
    slots: Operand | None,
    out: Operand | None,
) -> None:
    """Raise ValueError, in the name of ``op``, for shapes that do not fit one another; ``slots`` are to be ``[B]``."""
    letters = _LETTERS.get(len(x.shape))
    if letters is None:
        raise ValueError(
            f"{op}: x has {len(x.shape)} dimensions but must be [B, D] or [B, heads, D]; reshape x"
        )
    batch_letters, channel_letters, state_letters = letters
    shape, A_shape, B_shape = x.shape, A.shape, B.shape
    batch, channels = shape[0], shape[1:]
    if len(A_shape) != len(shape):
        raise ValueError(
            f"{op}: A has shape {list(A_shape)} but x of shape {list(shape)} wants {channel_letters} and N; "
            "give A one row of states per channel"
        )
    n = A_shape[-1]
    check_state_size(f"{op}: A", n)
    check_shape(op, "dt", dt, batch_letters, shape)
    check_shape(op, "z", z, batch_letters, shape)
    check_shape(op, "out", out, batch_letters, shape)
    check_shape(op, "A", A, state_letters, (*channels, n))
    check_shape(op, "D", D, channel_letters, channels)
    check_shape(op, "dt_bias", dt_bias, channel_letters, channels)
    if B_shape != (batch, n) or C.shape != B_shape:
        _check_groups(op, shape, B, C, n)
    check_shape(op, "state_batch_indices", slots, "[B]", (batch,))
    slots_needed = batch if slots is None else 0
    state_shape = state.shape
    if state_shape[1:] != A_shape or state_shape[0] < slots_needed:
        raise ValueError(
            f"{op}: state has shape {list(state_shape)} but must be [slots, *A.shape] with A of shape {list(A_shape)} "
            f"and at least {slots_needed} slots; allocate it so or pass state_batch_indices"
        )


def _check_groups(op: str, shape: torch.Size, B: Operand, C: Operand, n: int) -> None:
    """Raise ValueError unless B and C are ``[B, N]`` or ``[B, G, N]`` with groups that divide the channels or heads."""
    for name, tensor in (("B", B), ("C", C)):
        if len(tensor.shape) not in (2, 3) or tensor.shape[0] != shape[0] or tensor.shape[-1] != n:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)} but must be [B, N] or [B, G, N] with B = {shape[0]} "
                f"and N = {n}; reshape {name}"
            )
    groups = B.shape[1] if len(B.shape) == 3 else 1
    check_shape(op, "C", C, "the shape of B", B.shape)
    if groups == 0 or shape[1] % groups:
        of = "channels" if len(shape) == 2 else "heads"
        raise ValueError(
            f"{op}: B has {groups} groups for {shape[1]} {of} but G must divide their number; regroup B"
        )
