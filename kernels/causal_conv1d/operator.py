"""The two ops of the convolution, which write in place, and which implementation serves a call of them."""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.causal_conv1d.arguments import Convolution
from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.static_operands import declare_static_operands


def convolve_in_place(*arguments: Any) -> None:
    """Run a call of the op ``tp_mamba::causal_conv1d`` whose arguments have been checked."""
    convolve(Convolution(*arguments))


def update_in_place(
    out: torch.Tensor,
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    conv_state_indices: torch.Tensor | None,
    pad_slot_id: int,
) -> None:
    """Run a call of the op ``tp_mamba::causal_conv1d_update`` whose arguments have been checked."""
    if use_triton(x):
        from tp_mamba.kernels.causal_conv1d.mixer import launch

        if launch(out, x, weight, bias, conv_state, conv_state_indices, silu, pad_slot_id):
            return
    if x.dim() == 2:
        x, out = x.unsqueeze(-1), out.unsqueeze(-1)
    sequences = (None, conv_state_indices, None)
    convolve(
        Convolution(out, x, weight, bias, conv_state, *sequences, silu, True, pad_slot_id, zero_null=True)
    )


def convolve(call: Convolution) -> None:
    """Run the implementation that serves the call."""
    if use_triton(call.x):
        from tp_mamba.kernels.causal_conv1d.any import launch

        launch(*call)
    else:
        from tp_mamba.kernels.causal_conv1d.cpu import causal_conv1d_cpu

        causal_conv1d_cpu(call)


torch.library.define(
    "tp_mamba::causal_conv1d",
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor(b!)? states, Tensor? query_start_loc, "
    "Tensor? cache_indices, Tensor? has_initial_state, bool silu, bool all_initial, int pad_slot_id) -> ()",
)
torch.library.define(
    "tp_mamba::causal_conv1d_update",
    "(Tensor(a!) out, Tensor x, Tensor(b!) conv_state, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? conv_state_indices, int pad_slot_id) -> ()",
)
torch.library.impl("tp_mamba::causal_conv1d", ("cpu", "cuda"), convolve_in_place)
torch.library.impl("tp_mamba::causal_conv1d_update", ("cpu", "cuda"), update_in_place)
declare_static_operands("tp_mamba::causal_conv1d_update", "weight", "bias", "conv_state_indices")


@torch.library.register_fake("tp_mamba::causal_conv1d")
def _forward_fake(*_: object) -> None:
    """Everything is written in place."""


@torch.library.register_fake("tp_mamba::causal_conv1d_update")
def _update_fake(*_: object) -> None:
    """Everything is written in place."""
