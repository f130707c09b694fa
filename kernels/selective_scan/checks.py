"""What a call of the scan must be like, and the one form that B and C are brought to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from tp_mamba.kernels.common.checks import (
    check_device,
    check_floating,
    check_indices,
    check_mask,
    check_shape,
)
from tp_mamba.kernels.common.limits import check_state_size
from tp_mamba.kernels.common.remember import Form, Key, forms, remembered

FLOATING = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "ssm_states", "out")
"""The floating arguments, in the order in which their keys are checked."""


@remembered
def check_scan(op: str, keys: tuple[Key | None, ...], places: tuple[Key | None, ...], k: int | None) -> None:
    """Refuse what does not fit; ``keys`` belong to ``FLOATING``, ``places`` to starts, slots and initial states."""
    named = forms(**dict(zip(FLOATING, keys, strict=True)))
    starts, slots, initial = (None if key is None else Form(*key) for key in places)
    given: list[Any] = [form for _, form in named]
    u, delta, A, B, C, D, z, delta_bias, ssm_states, out = given
    indices = [("query_start_loc", starts), ("cache_indices", slots)]
    check_floating(op, named)
    check_indices(op, indices)
    check_device(op, u.device, "u", [*named, *indices, ("has_initial_state", initial)])

    packed = starts is not None
    dims = "[D, T]" if packed else "[B, D, L]"
    if len(u.shape) != (2 if packed else 3):
        remedy = "drop query_start_loc" if packed else "give query_start_loc for a packed batch"
        raise ValueError(
            f"{op}: u has {len(u.shape)} dimensions but {dims} is expected here; reshape u or {remedy}"
        )
    if starts is not None and (len(starts.shape) != 1 or starts.shape[0] == 0):
        raise ValueError(
            f"{op}: query_start_loc has shape {list(starts.shape)} but must be [S + 1]; "
            "pass the first token of each of S sequences and the end of the last"
        )
    if len(A.shape) != 2:
        raise ValueError(
            f"{op}: A has shape {list(A.shape)} but must be [D, N]; pass one row of states per channel"
        )
    channels, n = u.shape[-2], A.shape[1]
    sequences = starts.shape[0] - 1 if starts is not None else u.shape[0]
    check_state_size(f"{op}: A", n)
    for name, form in (("delta", delta), ("z", z), ("out", out)):
        check_shape(op, name, form, dims, u.shape)
    check_shape(op, "A", A, "[D, N]", (channels, n))
    check_shape(op, "D", D, "[D]", (channels,))
    check_shape(op, "delta_bias", delta_bias, "[D]", (channels,))
    for name, form in (("B", B), ("C", C)):
        _check_groups(op, name, form, u, n, packed)
    check_shape(op, "has_initial_state", initial, "[S]", (sequences,))
    check_mask(op, "has_initial_state", initial)
    if ssm_states is not None:
        slots_needed = sequences if slots is None else 0
        if (
            len(ssm_states.shape) != 3
            or ssm_states.shape[1:] != A.shape
            or ssm_states.shape[0] < slots_needed
        ):
            raise ValueError(
                f"{op}: ssm_states has shape {list(ssm_states.shape)} but must be [slots, D, N] with D = {channels}, "
                f"N = {n} and at least {slots_needed} slots; allocate it so or pass cache_indices"
            )
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise ValueError(
            f"{op}: save_states_every is {k!r} but must be an int of 1 or more; "
            "pass the number of tokens from one saved state to the next, or None to save none"
        )


def _check_groups(op: str, name: str, x: Form, u: Form, n: int, packed: bool) -> None:
    """Refuse a B or C whose shape does not fit that of ``u``."""
    (channels, length), dim = u.shape[-2:], len(x.shape)
    if not packed and dim == 2:
        check_shape(op, name, x, "[D, N]", (channels, n))
        return
    dims = "[N, T] or [G, N, T]" if packed else "[D, N], [B, N, L] or [B, G, N, L]"
    one_group = dim == len(u.shape)
    if (
        not (one_group or dim == len(u.shape) + 1)
        or x.shape[-2:] != (n, length)
        or (not packed and x.shape[0] != u.shape[0])
    ):
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)} but must be {dims} with N = {n} and "
            f"{'T' if packed else 'L'} = {length} for u of shape {list(u.shape)}; reshape {name}"
        )
    groups = 1 if one_group else x.shape[-3]
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{op}: {name} has {groups} groups for {channels} channels but G must divide D; regroup {name}"
        )


def wants_gradient(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether autograd is to see through a call with these inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def saved_rows(length: int, sequences: int, k: int, packed: bool) -> tuple[int, ...]:
    """Leading sizes of the states saved every k tokens of ``u [B, D, L]`` or packed ``[D, T]``."""
    # Rows of two sequences never meet: first // k + ceil(length / k) <= (first + length) // k + 1.
    return (length // k + sequences,) if packed else (sequences, -(-length // k))


def in_equal_groups(
    B: torch.Tensor, C: torch.Tensor, u: torch.Tensor, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and C as ``[B, G, N, L]``, packed ``[G, N, T]``: views, but for the one with fewer groups, above 1 each."""
    B, C = _by_group(B, u, packed), _by_group(C, u, packed)
    # One of them constant in time (a group a channel), or two numbers of groups.
    if B.shape[-3] != C.shape[-3]:
        groups = math.lcm(B.shape[-3], C.shape[-3])
        B, C = _in_groups(B, groups), _in_groups(C, groups)
    return B, C


def _by_group(x: torch.Tensor, u: torch.Tensor, packed: bool) -> torch.Tensor:
    """B or C as a view ``[B, G, N, L]``, packed ``[G, N, T]``; one constant in time has a group a channel."""
    if not packed and x.dim() == 2:
        return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1])
    return x.unsqueeze(-3) if x.dim() == u.dim() else x


def _in_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[..., G, N, L]`` with each group ``groups / G`` times in a row; a copy only if ``1 < G < groups``."""
    if x.shape[-3] in (1, groups):
        return x.expand(*x.shape[:-3], groups, *x.shape[-2:])
    return x.repeat_interleave(groups // x.shape[-3], dim=-3)
