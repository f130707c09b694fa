"""The op ``tp_mamba::selective_scan``, which writes in place, and which implementation serves a call of it."""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.selective_scan.arguments import SelectiveScan
from tp_mamba.kernels.selective_scan.operands import arguments_of

torch.library.define(
    "tp_mamba::selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? query_start_loc, Tensor? cache_indices, Tensor? has_initial_state, "
    "Tensor(a!)? ssm_states, Tensor(b!)? last_state, int pad_slot_id, Tensor(c!) out, "
    "Tensor(d!)? saved_states=None, int save_states_every=1) -> ()",
)


def selective_scan_in_place(*arguments: Any) -> None:
    """Run a call whose arguments have been checked."""
    call = SelectiveScan(*arguments)
    if not use_triton(call.u):
        from tp_mamba.kernels.selective_scan.cpu import selective_scan_cpu

        selective_scan_cpu(call)
        return
    from tp_mamba.kernels.selective_scan import any as any_layout
    from tp_mamba.kernels.selective_scan import mixer

    in_order = arguments_of(call)
    if not mixer.launch(*in_order):
        any_layout.launch(*in_order)


torch.library.impl("tp_mamba::selective_scan", ("cpu", "cuda"), selective_scan_in_place)


@torch.library.register_fake("tp_mamba::selective_scan")
def _selective_scan_fake(*args: object) -> None:
    return None
