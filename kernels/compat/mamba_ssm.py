"""mamba_ssm 2's functions: the two operators with what its forks add, and a mixer's whole inner part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn
from tp_mamba.kernels.common.checks import check_device, check_floating, check_shape
from tp_mamba.kernels.compat.keywords import Unused, only_defaults
from tp_mamba.kernels.rms_norm import rms_norm
from tp_mamba.kernels.selective_scan import selective_scan
from tp_mamba.kernels.selective_scan import selective_scan_fn as _scan
from tp_mamba.kernels.selective_scan.checks import wants_gradient
from tp_mamba.kernels.selective_state_update import selective_state_update

__all__ = ["mamba_inner_fn", "selective_scan_fn", "selective_state_update"]

_PACKED = "pack the sequences along T and call the convolution and the scan with query_start_loc"
_INNER_UNUSED: Unused = {"cu_seqlens": (None, _PACKED), "seq_idx": (None, _PACKED)}


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    prev_state: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """:func:`tp_mamba.kernels.selective_scan.selective_scan` with the two arguments that forks of mamba_ssm add.

    It has gradients for every input. That of the last state is taken into account, where mamba_ssm drops it.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state: as there, ``u`` as ``[B, D, L]``.
        prev_state: ``[B, D, N]``, the state to start from; stays as it is. Excludes ``cu_seqlens``.
        cu_seqlens: ``[S + 1]`` int32: the one sequence ``u [1, D, T]`` is S packed ones, each from a state of zeros.
            The last state is then that of the last sequence, ``[1, D, N]``.

    Raises:
        ValueError: as there; or both ``prev_state`` and ``cu_seqlens``, or more than one sequence with ``cu_seqlens``.
        RuntimeError: a second gradient is asked for.
    """
    op = "selective_scan_fn"
    if cu_seqlens is None:
        return selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus,
            initial_states=prev_state, return_final_states=return_last_state,
        )  # fmt: skip
    if prev_state is not None:
        raise ValueError(
            f"{op}: prev_state and cu_seqlens exclude each other: packed sequences start from zeros here"
        )
    if u.dim() != 3 or u.shape[0] != 1:
        raise ValueError(f"{op}: u has shape {list(u.shape)}: expected [1, D, T] with cu_seqlens")
    for name, x in (("delta", delta), ("z", z)):
        check_shape(op, name, x, "[1, D, T]", u.shape)
    B, C = (_of_one_sequence(op, name, x, u.shape[2]) for name, x in (("B", B), ("C", C)))
    result = _scan(
        u[0], delta[0], A, B, C, D, None if z is None else z[0], delta_bias, delta_softplus, return_last_state,
        query_start_loc=cu_seqlens,
    )  # fmt: skip
    if isinstance(result, tuple):
        return result[0][None], result[1][-1:]
    return result[None]


def _of_one_sequence(op: str, name: str, x: torch.Tensor, length: int) -> torch.Tensor:
    """B or C in the scan's packed form: ``[1, N, T]`` and ``[1, G, N, T]`` without the 1, ``[D, N]`` expanded."""
    if x.dim() == 2:
        return x[..., None].expand(-1, -1, length)
    if x.dim() not in (3, 4) or x.shape[0] != 1:
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)}: expected [D, N], [1, N, T] or [1, G, N, T] with cu_seqlens"
        )
    return x[0]


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    **others: object,
) -> torch.Tensor:
    """A Mamba-1 mixer between its input projection and its result, for whole sequences from a state of zeros.

    Convolution with SiLU, x_proj, norms of dt, B and C where weights are given, dt_proj, the gated scan, out_proj.
    Matched: mamba_ssm's ``mamba_inner_fn``, whose products are taken in the dtype of ``xz`` too. It has gradients for
    every tensor.

    Args:
        xz: ``[B, 2 D, L]``, x before z; any strides.
        conv1d_weight, conv1d_bias: ``[D, 1, K]`` and ``[D]`` or None.
        x_proj_weight: ``[R + 2 N, D]``, rows of dt before those of B and C. A given B or C has no rows there.
        delta_proj_weight: ``[D, R]``.
        out_proj_weight, out_proj_bias: ``[H, D]`` and ``[H]`` or None.
        A: ``[D, N]``, negative.
        B, C: constant in time ``[D, N]``, instead of x_proj's; None: x_proj's.
        D, delta_bias: ``[D]`` or None.
        B_proj_bias, C_proj_bias: ``[N]``, added to x_proj's B and C; or None.
        delta_softplus: apply softplus to the time steps.
        checkpoint_lvl: what the backward computes again. 0: nothing. 1: all between ``xz`` and the output of the gate,
            of which nothing is kept; mamba_ssm computes the convolution and the time steps again, and keeps the rest.
        b_rms_weight, c_rms_weight: ``[N]``; dt_rms_weight: ``[R]``; each norms its part of x_proj's result. Or None.
        b_c_dt_rms_eps: added to the mean squares of those norms.
        others: ``cu_seqlens`` and ``seq_idx``, which forks add, must be None.

    Returns:
        ``[B, L, H]``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: a second gradient is asked for.
    """
    op = "mamba_inner_fn"
    only_defaults(op, others, _INNER_UNUSED)
    named = [
        ("xz", xz), ("conv1d_weight", conv1d_weight), ("conv1d_bias", conv1d_bias), ("x_proj_weight", x_proj_weight),
        ("delta_proj_weight", delta_proj_weight), ("out_proj_weight", out_proj_weight),
        ("out_proj_bias", out_proj_bias), ("A", A), ("B", B), ("C", C), ("D", D), ("delta_bias", delta_bias),
        ("B_proj_bias", B_proj_bias), ("C_proj_bias", C_proj_bias), ("b_rms_weight", b_rms_weight),
        ("c_rms_weight", c_rms_weight), ("dt_rms_weight", dt_rms_weight),
    ]  # fmt: skip
    check_floating(op, named)
    check_device(op, xz.device, "xz", named)
    if not isinstance(checkpoint_lvl, int) or checkpoint_lvl not in (0, 1):
        raise ValueError(f"{op}: checkpoint_lvl is {checkpoint_lvl!r}: expected 0 or 1")
    for name, x, letters, dims in (
        ("xz", xz, "[B, 2 D, L]", 3),
        ("conv1d_weight", conv1d_weight, "[D, 1, K]", 3),
        ("x_proj_weight", x_proj_weight, "[R + 2 N, D]", 2),
        ("delta_proj_weight", delta_proj_weight, "[D, R]", 2),
        ("out_proj_weight", out_proj_weight, "[H, D]", 2),
        ("A", A, "[D, N]", 2),
    ):
        if x.dim() != dims:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}: expected {letters}")
    (channels, n), rank = A.shape, delta_proj_weight.shape[1]
    of_b, of_c = n if B is None else 0, n if C is None else 0
    check_shape(op, "xz", xz, "[B, 2 D, L]", (xz.shape[0], 2 * channels, xz.shape[2]))
    check_shape(op, "conv1d_weight", conv1d_weight, "[D, 1, K]", (channels, 1, conv1d_weight.shape[2]))
    check_shape(op, "x_proj_weight", x_proj_weight, "[R + 2 N, D]", (rank + of_b + of_c, channels))
    check_shape(op, "delta_proj_weight", delta_proj_weight, "[D, R]", (channels, rank))
    check_shape(op, "out_proj_weight", out_proj_weight, "[H, D]", (out_proj_weight.shape[0], channels))
    check_shape(op, "out_proj_bias", out_proj_bias, "[H]", (out_proj_weight.shape[0],))
    for name, constant in (("B", B), ("C", C)):
        check_shape(op, name, constant, "[D, N]", (channels, n))
    for name, of_states in (
        ("B_proj_bias", B_proj_bias), ("C_proj_bias", C_proj_bias),
        ("b_rms_weight", b_rms_weight), ("c_rms_weight", c_rms_weight),
    ):  # fmt: skip
        check_shape(op, name, of_states, "[N]", (n,))
    check_shape(op, "dt_rms_weight", dt_rms_weight, "[R]", (rank,))
    if not torch.is_autocast_enabled(xz.device.type):
        weights = (
            ("x_proj_weight", x_proj_weight),
            ("delta_proj_weight", delta_proj_weight),
            ("out_proj_weight", out_proj_weight),
        )
        for name, weight in weights:
            if weight.dtype != xz.dtype:
                raise ValueError(
                    f"{op}: {name} is {weight.dtype} and xz {xz.dtype}: convert one, or call it under torch.autocast"
                )

    def until_gate(xz: torch.Tensor) -> torch.Tensor:
        x, z = xz.chunk(2, dim=1)
        u = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
        assert isinstance(u, torch.Tensor)
        projected = F.linear(u.transpose(1, 2), x_proj_weight)
        dt, b, c = projected.split([rank, of_b, of_c], dim=-1)
        if dt_rms_weight is not None:
            dt = rms_norm(dt, dt_rms_weight, b_c_dt_rms_eps)
        delta = F.linear(dt, delta_proj_weight).transpose(1, 2)
        b = _with_bias_and_norm(b, B_proj_bias, b_rms_weight, b_c_dt_rms_eps) if B is None else B
        c = _with_bias_and_norm(c, C_proj_bias, c_rms_weight, b_c_dt_rms_eps) if C is None else C
        y = _scan(u, delta, A, b, c, D, z, delta_bias, delta_softplus)
        assert isinstance(y, torch.Tensor)
        return y.transpose(1, 2)

    if checkpoint_lvl and wants_gradient(x for _, x in named):
        y = checkpoint(until_gate, xz, use_reentrant=False, preserve_rng_state=False)
    else:
        y = until_gate(xz)
    return F.linear(y, out_proj_weight, out_proj_bias)


def _with_bias_and_norm(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """B or C of every token, ``[B, L, N]`` as x_proj gives it, for the scan: ``[B, N, L]``."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    if weight is not None:
        x = rms_norm(x, weight, eps)
    return x.transpose(1, 2)
