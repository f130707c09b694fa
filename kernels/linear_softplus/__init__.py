"""The time steps of the scan: a linear map of few inputs, its bias, and softplus, in one pass.

    out = softplus(x @ weight.T + bias)        # softplus(v) = log1p(exp(v)) up to 20, then v

The product is summed, the bias added and the softplus taken in float32 (float64 for float64 input); the result is
rounded once. This is Mamba's dt_proj with what the selective scan would else do to every time step it reads.
Gradients: ``backward.py``.

Bits: a row of the result depends neither on the other rows nor, within a class of calls, on their number. There are
two classes of 16-bit products on a GPU: up to 64 tokens (``mma.sync``, the instruction of ``dt_proj_state_update``)
and more (``wgmma``, without which prompts would take longer), whose rounding need not be the same. So the time steps of
a prompt may depend in their last bit on whether it is cut into pieces of at most 64 tokens. float32 has one order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tp_mamba.kernels.common.checks import (
    check_device,
    check_floating,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.product_shapes import check_product
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered
from tp_mamba.kernels.common.static_operands import declare_static_operands
from tp_mamba.kernels.linear_softplus import backward

_OP = "linear_softplus"

torch.library.define("tp_mamba::linear_softplus", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _linear_softplus(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    run: Callable[..., object]
    if use_triton(x):
        from tp_mamba.kernels.linear_softplus.any import launch as run
    else:
        from tp_mamba.kernels.linear_softplus.cpu import linear_softplus_cpu as run
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    run(out, x, weight, without_gaps(bias))
    return out


torch.library.impl("tp_mamba::linear_softplus", ("cpu", "cuda"), _linear_softplus)
declare_static_operands("tp_mamba::linear_softplus", "weight", "bias")


@torch.library.register_fake("tp_mamba::linear_softplus")
def _linear_softplus_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


torch.library.register_autograd(
    "tp_mamba::linear_softplus",
    backward.linear_softplus_gradients,
    setup_context=backward.save_linear_softplus,
)


def linear_softplus(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``softplus(x @ weight.T + bias)``, rounded once.

    float32 is multiplied in float32 on every device, whatever torch's setting for TF32.

    Args:
        x: ``[T, R]``; float32, bfloat16, float16 or float64, any strides. On a GPU, every stride between rows
            compiles its own kernel; a model has one.
        weight: ``[D, R]`` in the dtype of ``x``.
        bias: ``[D]`` in any float dtype, or None.

    Returns:
        ``[T, D]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
    """
    _check(key_of(x), key_of(weight), key_of(bias))
    op = _linear_softplus if calls_directly(x, weight, bias) else torch.ops.tp_mamba.linear_softplus
    return op(x, weight, bias)


@remembered
def _check(x: Key, weight: Key, bias: Key | None) -> None:
    inputs = forms(x=x, weight=weight, bias=bias)
    check_floating(_OP, inputs)
    check_device(_OP, x[2], "x", inputs)
    check_product(_OP, Form(*x), Form(*weight), None if bias is None else Form(*bias))
