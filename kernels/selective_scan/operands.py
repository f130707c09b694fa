"""What both kernels of the scan are passed: tensors, strides, and the constants that say which tensors there are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tp_mamba.kernels.common.alignment import strides_in_words
from tp_mamba.kernels.selective_scan.arguments import SelectiveScan


class Strides(NamedTuple):
    """Strides of a call: those of a packed batch have no sequence."""

    u: tuple[int, int, int]
    """Sequence, token, channel; so for the next three."""
    delta: tuple[int, int, int]
    z: tuple[int, int, int]
    out: tuple[int, int, int]
    A: tuple[int, ...]
    B: tuple[int, int, int, int]
    """Sequence, token, group, state."""
    C: tuple[int, int, int, int]
    rest: tuple[int, ...]
    """D, delta_bias, and the three of ssm_states."""

    @property
    def token_major(self) -> bool:
        """Whether channels, of B and C states, are contiguous."""
        by_channel = (self.u, self.delta, self.z, self.out, self.B, self.C)
        return all(strides[-1] == 1 for strides in by_channel)


def strides_of(call: SelectiveScan) -> Strides:
    """Each tensor's strides, read once."""
    packed = call.query_start_loc is not None
    D, bias, states = call.D, call.delta_bias, call.ssm_states
    return Strides(
        u=by_token(call.u, packed),
        delta=by_token(call.delta, packed),
        z=by_token(call.z, packed),
        out=by_token(call.out, packed),
        A=call.A.stride(),
        B=by_group(call.B, packed),
        C=by_group(call.C, packed),
        rest=(
            0 if D is None else D.stride(0),
            0 if bias is None else bias.stride(0),
            *((0, 0, 0) if states is None else states.stride()),
        ),
    )


def by_token(x: torch.Tensor | None, packed: bool) -> tuple[int, int, int]:
    """Strides (sequence, token, channel) of ``[B, D, L]`` or ``[D, T]``."""
    if x is None:
        return 0, 0, 1
    *sequence, channel, token = x.stride()
    return (0 if packed else sequence[0]), token, channel


def by_group(x: torch.Tensor, packed: bool) -> tuple[int, int, int, int]:
    """Strides (sequence, token, group, state) of ``[B, G, N, L]`` or ``[G, N, T]``."""
    *sequence, group, state, token = x.stride()
    return (0 if packed else sequence[0]), token, group, state


def arguments_of(call: SelectiveScan) -> tuple[Any, ...]:
    """The tensors of a call in the order in which both kernels take them, and what else it says."""
    return (
        call.u, call.delta, call.z, call.out, call.A, call.B, call.C, call.D, call.delta_bias, call.ssm_states,
        call.last_state, call.saved_states, call.query_start_loc, call.cache_indices, call.has_initial_state,
        call.delta_softplus, call.pad_slot_id, call.save_states_every,
    )  # fmt: skip


def call_of(*arguments: Any) -> SelectiveScan:
    """The call that :func:`arguments_of` gave these of."""
    u, delta, z, out, A, B, C, D, bias, states, last, saved, starts, slots, initial, *rest = arguments
    softplus, pad_slot_id, every = rest
    recurrence = (u, delta, A, B, C, D, z, bias, softplus)
    return SelectiveScan(*recurrence, starts, slots, initial, states, last, pad_slot_id, out, saved, every)


def flags_of(call: SelectiveScan) -> dict[str, bool]:
    """Constants of both kernels that say which tensors there are."""
    return {
        "VARLEN": call.query_start_loc is not None,
        "HAS_D": call.D is not None,
        "HAS_Z": call.z is not None,
        "HAS_BIAS": call.delta_bias is not None,
        "SOFTPLUS": call.delta_softplus,
        "HAS_STATE": call.ssm_states is not None,
        "HAS_SLOTS": call.cache_indices is not None,
        "HAS_INITIAL": call.has_initial_state is not None,
        "HAS_LAST": call.last_state is not None,
        "HAS_SAVED": call.saved_states is not None,
    }


def rows_aligned(size: int, x: torch.Tensor) -> bool:
    """Whether every token's row, which is the last dimension but one, begins at a multiple of ``size`` bytes."""
    return size % x.element_size() == 0 and strides_in_words(x, size // x.element_size(), -2) is not None
