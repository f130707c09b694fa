"""vLLM's call of the scan: states second, its result over the gate."""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.checks import PREFIX_CACHING
from tp_mamba.kernels.compat.keywords import Unused, only_defaults
from tp_mamba.kernels.compat.vllm.arguments import BLOCKS, no_slot
from tp_mamba.kernels.selective_scan import selective_scan_fn as _scan

_UNUSED: Unused = BLOCKS | dict.fromkeys(("cu_chunk_seqlen", "last_chunk_indices"), (None, PREFIX_CACHING))


def selective_scan_fn(
    u: torch.Tensor,
    ssm_states: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    null_block_id: int | None = None,
    block_size: int = 1024,
    *,
    pad_slot_id: int | None = None,
    **others: object,
) -> torch.Tensor:
    """:func:`tp_mamba.kernels.selective_scan.selective_scan_fn` with states second, and its result in place.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as there, ``[B, D, L]`` or packed ``[D, T]``.
        ssm_states: ``[slots, D, N]``, read where ``has_initial_state`` says so and written in place.
        query_start_loc, cache_indices, has_initial_state: as there.
        null_block_id, pad_slot_id: the slot number that means no slot, two names for one; 0 unless given.
        block_size: of prefix caching, which is off: of no effect.
        others: the tensors of prefix caching, which must be None.

    Returns:
        ``z``, written over, or without a gate ``delta``.

    Raises:
        ValueError: as there; or an argument of prefix caching; or two different numbers for no slot.
        RuntimeError: an input requires grad while grad mode is on.
    """
    op = "selective_scan_fn"
    only_defaults(op, others, _UNUSED)
    y = _scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus,
        query_start_loc=query_start_loc, cache_indices=cache_indices, has_initial_state=has_initial_state,
        ssm_states=ssm_states, pad_slot_id=no_slot(op, null_block_id, pad_slot_id), out=delta if z is None else z,
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    return y
