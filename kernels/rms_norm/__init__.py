"""RMSNorm over the last axis, and RMSNorm with residual add.

    rms_norm(x)        = x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm(x, r) = rms_norm(x + r), x + r

Sums and products are taken in float32 (float64 for float64 input) and cast once, after the weight: the form
of mamba_ssm and vLLM. (transformers rounds to the dtype of x before it multiplies by the weight.) The norm
sees ``x + r`` before it is rounded to the residual's dtype.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.checks import check_device, check_dtype, check_floating, refuse_grad
from tp_mamba.kernels.common.dispatch import use_triton


def _run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    residual_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if use_triton(x):
        from tp_mamba.kernels.rms_norm.any import launch as run
    else:
        from tp_mamba.kernels.rms_norm.cpu import rms_norm_cpu as run
    H = x.shape[-1]
    out = x.new_empty(x.shape, dtype=out_dtype)
    new_residual = None if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype)
    run(
        out.view(-1, H),
        x.reshape(-1, H),
        None if residual is None else residual.reshape(-1, H),
        None if new_residual is None else new_residual.view(-1, H),
        weight,
        eps,
    )
    return out, new_residual


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _run(x, residual, weight, eps, residual_dtype, out_dtype)


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


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Normalise the last axis of ``x`` by its root mean square.

    Args:
        x: ``[..., H]``; float32, bfloat16, float16 or float64. Rows may be columns of a wider tensor.
        weight: ``[H]`` in any float dtype, or None.
        eps: added to the mean square.
        out_dtype: dtype of the result, by default that of ``x``.

    Returns:
        ``[..., H]``, contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
        RuntimeError: an input requires grad while grad mode is on.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check("rms_norm", x, weight, None, out_dtype)
    return torch.ops.tp_mamba.rms_norm(x, weight, eps, out_dtype)


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
        RuntimeError: an input requires grad while grad mode is on.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check("add_rms_norm", x, weight, residual, out_dtype)
    residual_dtype = torch.float32 if residual_in_fp32 and x.dtype != torch.float64 else x.dtype
    return torch.ops.tp_mamba.add_rms_norm(x, residual, weight, eps, residual_dtype, out_dtype)


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Refuse wrong shapes, dtypes, devices, and inputs that want a gradient."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}: expected [..., H] with at least one column")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}: expected [{x.shape[-1]}], a value a column"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual has shape {list(residual.shape)}: expected that of x, {list(x.shape)}"
        )
    check_dtype(op, "out_dtype is", out_dtype)
    inputs = [("x", x), ("weight", weight), ("residual", residual)]
    check_floating(op, inputs)
    check_device(op, x.device, "x", inputs)
    refuse_grad(op, inputs)
