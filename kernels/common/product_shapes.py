"""The shapes of a product ``x @ weight.T + bias``: what linear_softplus and the fused decode step check."""

from __future__ import annotations

from tp_mamba.kernels.common.checks import Operand, check_shape


def check_product(op: str, x: Operand, weight: Operand, bias: Operand | None, name: str = "x") -> None:
    """Raise ValueError, in the name of ``op``, for shapes and dtypes that do not fit; it calls ``x`` ``name``."""
    if len(x.shape) != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)} but must be [T, R] with at least one column; flatten the tokens"
        )
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)} but must be [D, R] with R = {x.shape[1]}, as in {name}; "
            "give it one row per channel"
        )
    if weight.dtype != x.dtype:
        raise ValueError(
            f"{op}: weight has dtype {weight.dtype} but {name} has {x.dtype}; convert one of them to the other's"
        )
    check_shape(op, "bias", bias, "[D]", weight.shape[:1])
