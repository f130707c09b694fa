"""The output of x_proj cut into dt, B and C, each normalised if the model does so, in one pass.

    dt, B, C = split(x, [R, N, N])
    dt, B, C = rms_norm(dt), rms_norm(B), rms_norm(C)        # FalconMamba; with weights: Jamba

B and C leave in float32, in which the scan works, as halves of one tensor ``[T, 2 N]``: the scan reaches both of a
token from one address. Norms are computed and rounded as in ``rms_norm.py``.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.checks import (
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    refuse_grad,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import use_triton
from tp_mamba.kernels.common.limits import MAX_STATE_SIZE

_OP = "split_dt_bc"

torch.library.define(
    "tp_mamba::split_dt_bc",
    "(Tensor x, int time_step_rank, int state_size, Tensor? dt_weight, Tensor? b_weight, Tensor? c_weight, "
    "float? eps, ScalarType dt_dtype) -> (Tensor, Tensor)",
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.impl("tp_mamba::split_dt_bc", ("cpu", "cuda"))
def _split_dt_bc(
    x: torch.Tensor,
    time_step_rank: int,
    state_size: int,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
    dt_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if use_triton(x):
        from tp_mamba.kernels.split_dt_bc.mixer import launch as run
    else:
        from tp_mamba.kernels.split_dt_bc.cpu import split_dt_bc_cpu as run
    dt = x.new_empty(x.shape[-2], time_step_rank, dtype=dt_dtype)
    bc = x.new_empty(x.shape[-2], 2 * state_size, dtype=_wide(x.dtype))
    run(dt, bc, x, without_gaps(dt_weight), without_gaps(b_weight), without_gaps(c_weight), eps)
    return dt, bc


@torch.library.register_fake("tp_mamba::split_dt_bc")
def _split_dt_bc_fake(
    x: torch.Tensor,
    time_step_rank: int,
    state_size: int,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
    dt_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    dt = x.new_empty(x.shape[-2], time_step_rank, dtype=dt_dtype)
    return dt, x.new_empty(x.shape[-2], 2 * state_size, dtype=_wide(x.dtype))


def split_dt_bc(
    x: torch.Tensor,
    time_step_rank: int,
    state_size: int,
    *,
    dt_weight: torch.Tensor | None = None,
    b_weight: torch.Tensor | None = None,
    c_weight: torch.Tensor | None = None,
    eps: float | None = None,
    dt_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut ``x`` into dt, B and C, in this order, and normalise each by its root mean square if ``eps`` is given.

    Args:
        x: ``[T, R + 2 N]``; float32, bfloat16, float16 or float64, any strides. Or ``[slices, T, R + 2 N]`` in
            float32 or float64, to be added up first, in an aligned binary tree: what ``skinny_linear_slices`` gives.
        time_step_rank: R, the columns of dt.
        state_size: N, 1 to 256, the columns of B and of C.
        dt_weight, b_weight, c_weight: ``[R]``, ``[N]`` and ``[N]`` in any float dtype, the weights of the norms;
            each may be None.
        eps: added to the mean squares. None: no norms.
        dt_dtype: dtype of dt, by default that of ``x``.

    Returns:
        ``(dt, B, C)``: ``dt [T, R]`` contiguous in ``dt_dtype``; ``B`` and ``C [T, N]`` in float32 (float64 for
        float64 ``x``), the two halves of one contiguous ``[T, 2 N]``. On a CPU, where nothing has to be computed
        (no norms, ``x`` in float32 or float64 and ``dt_dtype`` that of ``x``), all three are views of ``x``.

    Raises:
        ValueError: an argument has a wrong shape, size, dtype or device, or a weight comes without ``eps``.
        RuntimeError: an input requires grad while grad mode is on, and there are norms or slices (without, the
            gradients of the casts are exact).
    """
    R, N = time_step_rank, state_size
    dt_dtype = x.dtype if dt_dtype is None else dt_dtype
    weights = [("dt_weight", dt_weight), ("b_weight", b_weight), ("c_weight", c_weight)]
    inputs = [("x", x), *weights]
    check_dtype(_OP, "dt_dtype is", dt_dtype)
    check_floating(_OP, inputs)
    check_device(_OP, x.device, "x", inputs)
    if R < 1:
        raise ValueError(f"{_OP}: time_step_rank is {R} but must be at least 1; pass the columns of dt")
    if not 1 <= N <= MAX_STATE_SIZE:
        raise ValueError(f"{_OP}: state_size is {N} but must be 1 to {MAX_STATE_SIZE}; pass the columns of B")
    if x.dim() not in (2, 3) or x.shape[-1] != R + 2 * N:
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} but must be [T, R + 2 N] = [T, {R + 2 * N}]; pass all of x_proj's "
            "output"
        )
    if x.dim() == 3 and (len(x) == 0 or x.dtype != _wide(x.dtype)):
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} and dtype {x.dtype}, but slices to be added up must be at least one, "
            "in float32 or float64; pass what skinny_linear_slices gives"
        )
    check_shape(_OP, "dt_weight", dt_weight, "[R]", (R,))
    check_shape(_OP, "b_weight", b_weight, "[N]", (N,))
    check_shape(_OP, "c_weight", c_weight, "[N]", (N,))
    if eps is None:
        for name, weight in weights:
            if weight is not None:
                raise ValueError(
                    f"{_OP}: {name} is given but eps is None, so nothing is normalised; pass eps too"
                )
    if (
        x.dim() == 2 and eps is None and torch.is_grad_enabled() and x.requires_grad
    ):  # casts alone, whose gradients torch has
        dt, B, C = x.split([R, N, N], dim=1)
        return dt.to(dt_dtype), B.to(_wide(x.dtype)), C.to(_wide(x.dtype))
    refuse_grad(_OP, inputs)

    casts = eps is not None or x.dtype != dt_dtype or x.dtype != _wide(x.dtype)
    if x.dim() == 2 and not casts and x.device.type == "cpu" and not use_triton(x):
        dt, B, C = x.split([R, N, N], dim=1)
        return dt, B, C
    dt, bc = torch.ops.tp_mamba.split_dt_bc(x, R, N, dt_weight, b_weight, c_weight, eps, dt_dtype)
    return dt, bc[:, :N], bc[:, N:]
