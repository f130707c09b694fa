"""RMSNorm over the last dimension, and RMSNorm with residual add.

    rms_norm(x)        = x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm(x, r) = rms_norm(x + r), x + r

Sums and products are taken in float32 (float64 for float64 input) and cast once, after the weight: the form
of mamba_ssm and vLLM. (transformers rounds to the dtype of x before it multiplies by the weight.) The norm
sees ``x + r`` before it is rounded to the residual's dtype. Gradients: ``backward.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch

from tp_mamba.kernels.common.checks import check_device, check_dtype, check_floating
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered
from tp_mamba.kernels.common.static_operands import declare_static_operands
from tp_mamba.kernels.rms_norm import backward


def _run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    residual_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    run: Callable[..., object]
    if use_triton(x):
        from tp_mamba.kernels.rms_norm.any import launch as run
    else:
        from tp_mamba.kernels.rms_norm.cpu import rms_norm_cpu as run
    out = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    new_residual = (
        None
        if residual_dtype is None
        else torch.empty_like(x, dtype=residual_dtype, memory_format=torch.contiguous_format)
    )
    if x.dim() == 2:
        run(out, x, residual, new_residual, weight, eps)
    else:
        run(_rows(out), _rows(x), _rows(residual), _rows(new_residual), weight, eps)
    return out, new_residual


@overload
def _rows(x: torch.Tensor) -> torch.Tensor: ...
@overload
def _rows(x: torch.Tensor | None) -> torch.Tensor | None: ...
def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, out_dtype: torch.dtype
) -> torch.Tensor:
    return _run(x, None, weight, eps, None, out_dtype)[0]


def _add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, new_residual = _run(x, residual, weight, eps, residual_dtype, out_dtype)
    assert new_residual is not None
    return out, new_residual


torch.library.define(
    "tp_mamba::rms_norm", "(Tensor x, Tensor? weight, float eps, ScalarType out_dtype) -> Tensor"
)
torch.library.define(
    "tp_mamba::add_rms_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, ScalarType residual_dtype, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
)
torch.library.impl("tp_mamba::rms_norm", ("cpu", "cuda"), _rms_norm)
torch.library.impl("tp_mamba::add_rms_norm", ("cpu", "cuda"), _add_rms_norm)
declare_static_operands("tp_mamba::rms_norm", "weight")
declare_static_operands("tp_mamba::add_rms_norm", "weight")


@torch.library.register_fake("tp_mamba::rms_norm")
def _rms_norm_fake(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, out_dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.register_fake("tp_mamba::add_rms_norm")
def _add_rms_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape, dtype=residual_dtype)


torch.library.register_autograd(
    "tp_mamba::rms_norm", backward.rms_norm_gradients, setup_context=backward.save_rms_norm
)
torch.library.register_autograd(
    "tp_mamba::add_rms_norm", backward.add_rms_norm_gradients, setup_context=backward.save_add_rms_norm
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Normalise the last dimension of ``x`` by its root mean square.

    Args:
        x: ``[..., H]``; float32, bfloat16, float16 or float64. Rows may be columns of a wider tensor.
        weight: ``[H]`` in any float dtype, or None.
        eps: added to the mean square.
        out_dtype: dtype of the result, by default that of ``x``.

    Returns:
        ``[..., H]``, contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check("rms_norm", x, weight, None, out_dtype)
    op = _rms_norm if calls_directly(x, weight) else torch.ops.tp_mamba.rms_norm
    return op(x, weight, eps, out_dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual_in_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    Args:
        x: ``[..., H]``, the output of the layer before; float32, bfloat16, float16 or float64.
        residual: ``[..., H]`` in any float dtype; None in the first layer, where ``x`` starts the stream.
        weight: ``[H]`` in any float dtype, or None.
        eps: added to the mean square.
        residual_in_fp32: keep the new residual in float32, not in the dtype of ``x`` (float64 stays float64).
        out_dtype: dtype of the normalised tensor, by default that of ``x``.

    Returns:
        ``(normed, new_residual)``, both ``[..., H]`` and contiguous; neither shares memory with an input.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check("add_rms_norm", x, weight, residual, out_dtype)
    residual_dtype = torch.float32 if residual_in_fp32 and x.dtype != torch.float64 else x.dtype
    op = _add_rms_norm if calls_directly(x, residual, weight) else torch.ops.tp_mamba.add_rms_norm
    return op(x, residual, weight, eps, residual_dtype, out_dtype)


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Refuse wrong shapes, dtypes and devices."""
    _check_call(op, key_of(x), key_of(weight), key_of(residual), out_dtype)


@remembered
def _check_call(
    op: str, x_key: Key, weight: Key | None, residual: Key | None, out_dtype: torch.dtype
) -> None:
    x = Form(*x_key)
    if len(x.shape) == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}: expected [..., H] with at least one column")
    if weight is not None and weight[0] != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight has shape {list(weight[0])}: expected [{x.shape[-1]}], one value per column"
        )
    if residual is not None and residual[0] != x.shape:
        raise ValueError(f"{op}: residual has shape {list(residual[0])}: expected that of x, {list(x.shape)}")
    check_dtype(op, "out_dtype is", out_dtype)
    inputs = forms(x=x_key, weight=weight, residual=residual)
    check_floating(op, inputs)
    check_device(op, x.device, "x", inputs)
