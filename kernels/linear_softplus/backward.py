"""The backward of softplus and of the product under it.

With ``v = x @ weight.T + bias``,

    dv = dout sigmoid(v)        dx = dv @ weight        dweight = dv.T @ x        dbias = sum over tokens of dv

x, weight and bias are all that is kept. v is computed anew: in one pass with dv, that costs less than to read the
forward's result, and v is not rounded. dbias is summed in float32, before dv is rounded for the two products, which are
those of ``linear/backward.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.gradients import refuse_second_derivative
from tp_mamba.kernels.linear.backward import product_dtype, product_gradients

_BACKWARD = "tp_mamba::linear_softplus_backward"

torch.library.define(
    _BACKWARD, "(Tensor dout, Tensor x, Tensor weight, Tensor? bias, ScalarType dv_dtype) -> (Tensor, Tensor)"
)


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dv_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dv [T, D]``, and ``dbias [D]``, without elements where there is no bias."""
    if use_triton(x):
        from tp_mamba.kernels.linear_softplus.any_backward import launch as run
    else:
        from tp_mamba.kernels.linear_softplus.cpu_backward import linear_softplus_backward_cpu as run

    dv, dbias = _outputs(dout, bias, dv_dtype)
    run(dv, None if bias is None else dbias, dout, x, weight, bias)
    return dv, dbias


def _outputs(
    dout: torch.Tensor, bias: torch.Tensor | None, dv_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    dbias = dout.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dout.new_empty(dout.shape, dtype=dv_dtype), dbias


torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)
refuse_second_derivative(_BACKWARD)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dv_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(dout, bias, dv_dtype)


def save_linear_softplus(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def linear_softplus_gradients(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dv, dbias = torch.ops.tp_mamba.linear_softplus_backward(dout, x, weight, bias, product_dtype(x))
    dx, dweight = product_gradients(dv, x, weight, ctx.needs_input_grad)
    return dx, dweight, None if bias is None else dbias
