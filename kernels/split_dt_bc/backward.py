"""The backward of the split: three backwards of RMSNorm (``rms_norm/backward.py``) in one, or three casts.

Only x is kept, and nothing at all where there are no norms. The gradient of every slice of x is that of their sum.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.checks import without_gaps
from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.gradients import refuse_second_derivative

_BACKWARD = "tp_mamba::split_dt_bc_backward"

torch.library.define(
    _BACKWARD,
    "(Tensor ddt, Tensor dbc, Tensor? x, Tensor? dt_weight, Tensor? b_weight, Tensor? c_weight, float? eps, "
    "ScalarType x_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _backward(
    ddt: torch.Tensor,
    dbc: torch.Tensor,
    x: torch.Tensor | None,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
    x_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dx [T, R + 2 N]``, and the gradients of the three weights, without elements where there is none."""
    if use_triton(ddt):
        from tp_mamba.kernels.split_dt_bc.any_backward import launch as run
    else:
        from tp_mamba.kernels.split_dt_bc.cpu_backward import split_dt_bc_backward_cpu as run

    outputs = _outputs(ddt, dbc, dt_weight, b_weight, c_weight, x_dtype)
    weights = (without_gaps(dt_weight), without_gaps(b_weight), without_gaps(c_weight))
    run(*outputs, ddt, dbc, x, *weights, eps)
    return outputs


def _outputs(
    ddt: torch.Tensor,
    dbc: torch.Tensor,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    x_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = ddt.new_empty(ddt.shape[0], ddt.shape[1] + dbc.shape[1], dtype=x_dtype)
    dweights = [
        ddt.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for weight in (dt_weight, b_weight, c_weight)
    ]
    return dx, dweights[0], dweights[1], dweights[2]


torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)
refuse_second_derivative(_BACKWARD)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    ddt: torch.Tensor,
    dbc: torch.Tensor,
    x: torch.Tensor | None,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
    x_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(ddt, dbc, dt_weight, b_weight, c_weight, x_dtype)


def save_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _, _, *weights, ctx.eps, _ = inputs
    ctx.x_dtype, ctx.slices = x.dtype, x.shape[0] if x.dim() == 3 else None
    ctx.save_for_backward(None if ctx.eps is None else x, *weights)


def split_gradients(ctx: Any, ddt: torch.Tensor, dbc: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, *weights = ctx.saved_tensors
    dx, *dweights = torch.ops.tp_mamba.split_dt_bc_backward(ddt, dbc, x, *weights, ctx.eps, ctx.x_dtype)
    if ctx.slices is not None:
        dx = dx.expand(ctx.slices, *dx.shape)
    given = [None if w is None else dw for w, dw in zip(weights, dweights, strict=True)]
    return dx, None, None, *given, None, None
