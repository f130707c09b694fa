"""The backward of RMSNorm and of RMSNorm with residual add.

With ``s = x + r``, ``q = 1 / sqrt(mean(s^2) + eps)``, ``n = s q`` and ``g = dout * weight``,

    ds = q (g - n mean(g n)) + dsum        dx = dr = ds        dweight = sum over rows of dout n

where ``dsum`` is the gradient of the second output, the sum itself. Everything is computed in float32 (float64 for
float64) from ``s``, which is read and not recomputed where the forward wrote it without rounding: a residual stream in
float32 is therefore all that is kept. Otherwise x and the residual are kept. Norms are always computed anew.
"""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.common.gradients import refuse_second_derivative

_BACKWARD = "tp_mamba::rms_norm_backward"

torch.library.define(
    _BACKWARD,
    "(Tensor dout, Tensor? dsum, Tensor x, Tensor? residual, Tensor? weight, float eps, ScalarType x_dtype, "
    "ScalarType residual_dtype) -> (Tensor, Tensor, Tensor)",
)


def _backward(
    dout: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dx, dresidual, dweight)``; dresidual is empty where its dtype is that of dx, dweight without a weight."""
    if use_triton(x):
        from tp_mamba.kernels.rms_norm.any_backward import launch as run
    else:
        from tp_mamba.kernels.rms_norm.cpu_backward import rms_norm_backward_cpu as run

    dx, dresidual, dweight = _outputs(x, weight, x_dtype, residual_dtype)
    H = x.shape[-1]
    run(
        dx.view(-1, H),
        None if residual_dtype == x_dtype else dresidual.view(-1, H),
        None if weight is None else dweight,
        dout.reshape(-1, H),
        None if dsum is None else dsum.reshape(-1, H),
        x.reshape(-1, H),
        None if residual is None else residual.reshape(-1, H),
        weight,
        eps,
    )
    return dx, dresidual, dweight


def _outputs(
    x: torch.Tensor, weight: torch.Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = x.new_empty(x.shape, dtype=x_dtype)
    dresidual = x.new_empty((0,) if residual_dtype == x_dtype else x.shape, dtype=residual_dtype)
    return dx, dresidual, x.new_empty(0) if weight is None else torch.empty_like(weight).contiguous()


torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)
refuse_second_derivative(_BACKWARD)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    dout: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(x, weight, x_dtype, residual_dtype)


def save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def rms_norm_gradients(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, _, dweight = torch.ops.tp_mamba.rms_norm_backward(
        dout, None, x, None, weight, ctx.eps, x.dtype, x.dtype
    )
    return dx, None if weight is None else dweight, None, None


def save_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, residual, weight, ctx.eps, stored, _ = inputs
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    exact = stored == wide_dtype(x.dtype) or (residual is None and stored == x.dtype)
    summands = (output[1], None) if exact else (x, residual)
    ctx.save_for_backward(*summands, weight)
    ctx.set_materialize_grads(False)


def add_rms_norm_gradients(
    ctx: Any, dout: torch.Tensor | None, dsum: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    x, residual, weight = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.x_dtype, ctx.residual_dtype or ctx.x_dtype
    dresidual = dweight = None
    if dout is not None:
        dx, dresidual, dweight = torch.ops.tp_mamba.rms_norm_backward(
            dout, dsum, x, residual, weight, ctx.eps, x_dtype, residual_dtype
        )
        dresidual = dx if residual_dtype == x_dtype else dresidual
    elif dsum is not None:
        dx, dresidual = dsum.to(x_dtype), dsum.to(residual_dtype)
    else:
        return (None,) * 6
    dresidual = None if ctx.residual_dtype is None else dresidual
    return dx, dresidual, None if weight is None else dweight, None, None, None
