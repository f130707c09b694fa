"""The output of x_proj cut into dt, B and C, each normalised if the model does so, in one pass.

    dt, B, C = split(x, [R, N, N])
    dt, B, C = rms_norm(dt), rms_norm(B), rms_norm(C)        # FalconMamba; with weights: Jamba

B and C leave in float32, in which the scan works, as halves of one tensor ``[T, 2 N]``: the scan reaches both of a
token from one address. Norms are computed and rounded as in ``rms_norm``.

Gradients: ``backward.py``.

Bits: on a GPU a row's bits depend neither on the other rows nor on whether x comes whole or in slices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tp_mamba.kernels.common.checks import (
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    without_gaps,
)
from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.common.limits import MAX_STATE_SIZE
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered
from tp_mamba.kernels.common.static_operands import declare_static_operands
from tp_mamba.kernels.split_dt_bc import backward

_OP = "split_dt_bc"

torch.library.define(
    "tp_mamba::split_dt_bc",
    "(Tensor x, int time_step_rank, int state_size, Tensor? dt_weight, Tensor? b_weight, Tensor? c_weight, "
    "float? eps, ScalarType dt_dtype) -> (Tensor, Tensor)",
)


declare_static_operands("tp_mamba::split_dt_bc", "dt_weight", "b_weight", "c_weight")


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
    run: Callable[..., object]
    if use_triton(x):
        from tp_mamba.kernels.split_dt_bc.any import launch as run
    else:
        from tp_mamba.kernels.split_dt_bc.cpu import split_dt_bc_cpu as run
    if x.dim() == 3:
        x = x.contiguous()
    T, device = x.shape[-2], x.device
    dt = torch.empty(T, time_step_rank, dtype=dt_dtype, device=device)
    bc = torch.empty(T, 2 * state_size, dtype=wide_dtype(x.dtype), device=device)
    run(dt, bc, x, without_gaps(dt_weight), without_gaps(b_weight), without_gaps(c_weight), eps)
    return dt, bc


torch.library.impl("tp_mamba::split_dt_bc", ("cpu", "cuda"), _split_dt_bc)


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
    return dt, x.new_empty(x.shape[-2], 2 * state_size, dtype=wide_dtype(x.dtype))


torch.library.register_autograd(
    "tp_mamba::split_dt_bc", backward.split_gradients, setup_context=backward.save_split
)


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
    """
    R, N = time_step_rank, state_size
    dt_dtype = x.dtype if dt_dtype is None else dt_dtype
    _check(key_of(x), R, N, key_of(dt_weight), key_of(b_weight), key_of(c_weight), eps is not None, dt_dtype)
    if eps is None and x.dim() == 2:
        as_it_is = dt_dtype == x.dtype == wide_dtype(x.dtype) and x.is_cpu and not use_triton(x)
        if as_it_is:
            dt, B, C = x.split([R, N, N], dim=1)
            return dt, B, C
    op = _split_dt_bc if calls_directly(x, dt_weight, b_weight, c_weight) else torch.ops.tp_mamba.split_dt_bc
    dt, bc = op(x, R, N, dt_weight, b_weight, c_weight, eps, dt_dtype)
    B, C = torch.split_with_sizes(bc, (N, N), 1)
    return dt, B, C


@remembered
def _check(
    x_key: Key,
    R: int,
    N: int,
    dt_weight: Key | None,
    b_weight: Key | None,
    c_weight: Key | None,
    normed: bool,
    dt_dtype: torch.dtype,
) -> None:
    x, weights = Form(*x_key), forms(dt_weight=dt_weight, b_weight=b_weight, c_weight=c_weight)
    inputs = [("x", x), *weights]
    check_dtype(_OP, "dt_dtype is", dt_dtype)
    check_floating(_OP, inputs)
    check_device(_OP, x.device, "x", inputs)
    if R < 1:
        raise ValueError(f"{_OP}: time_step_rank is {R} but must be at least 1; pass the columns of dt")
    if not 1 <= N <= MAX_STATE_SIZE:
        raise ValueError(f"{_OP}: state_size is {N} but must be 1 to {MAX_STATE_SIZE}; pass the columns of B")
    if len(x.shape) not in (2, 3) or x.shape[-1] != R + 2 * N:
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} but must be [T, R + 2 N] = [T, {R + 2 * N}]; pass all of x_proj's "
            "output"
        )
    if len(x.shape) == 3 and (x.shape[0] == 0 or x.dtype != wide_dtype(x.dtype)):
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} and dtype {x.dtype}, but slices to be added up must be at least one, "
            "in float32 or float64; pass what skinny_linear_slices gives"
        )
    for (name, weight), (letters, size) in zip(weights, (("[R]", R), ("[N]", N), ("[N]", N)), strict=True):
        check_shape(_OP, name, weight, letters, (size,))
        if weight is not None and not normed:
            raise ValueError(
                f"{_OP}: {name} is given but eps is None, so nothing is normalised; pass eps too"
            )
